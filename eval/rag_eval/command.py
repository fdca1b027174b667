"""What the commands of evaluation say: progress and refusals on stderr, one JSON object or a table on stdout."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

from rag_eval.arguments import INTERRUPTED
from rag_pipeline.errors import RagPipelineError
from rag_pipeline.interrupts import one_interrupt
from retrievers.errors import RetrievalError

_P = ParamSpec("_P")
_Report = TypeVar("_Report", bound=Mapping[str, Any])

MEASURED_IS_PRINTED = "what was measured until then is printed"
"""Said where a run ends early."""

Progress = Callable[[str], None]
"""Called with one line of text as a measurement goes on."""


def say_progress(line: str) -> None:
    """Print a line on stderr at once."""
    print(line, file=sys.stderr, flush=True)


def no_progress(line: str) -> None:
    """Say nothing; for a measurement that is called from Python."""


def refusals_in_one_line(main: Callable[_P, int]) -> Callable[_P, int]:
    """Let a command end with one line on stderr where the user's input is refused (1), or it is interrupted (130)."""

    @functools.wraps(main)
    def told(*args: _P.args, **kwargs: _P.kwargs) -> int:
        try:
            with one_interrupt():
                return main(*args, **kwargs)
        except KeyboardInterrupt:
            return broken_off(measured=False)
        except (RagPipelineError, RetrievalError) as error:
            say_progress(f"error: {error}")
            return 1

    return told


def broken_off(*, measured: bool) -> int:
    """Say in one line that a run was interrupted, behind what it printed; returns the exit code."""
    what = MEASURED_IS_PRINTED if measured else "there is no report yet"
    say_progress(f"error: interrupted; {what}")
    return INTERRUPTED


def print_report(report: _Report, table: Callable[[_Report], str], *, as_json: bool) -> int:
    """Print a report on stdout, and return the exit code that goes with it.

    Parameters
    ----------
    report : mapping
        ``interrupted`` is true where the run was broken off, ``failure`` says in one line of what it failed.
    table : callable
        The report as text.
    as_json : bool
        Whether it is printed as one JSON object instead.
    """
    print(json_line(report) if as_json else table(report), flush=True)
    if report.get("failure"):
        say_progress(f"error: {report['failure']}; {MEASURED_IS_PRINTED}")
        return 1
    return broken_off(measured=True) if report.get("interrupted") else 0


def json_line(report: Mapping[str, Any]) -> str:
    """One JSON object in one line; a number that JSON does not have raises :class:`ValueError`."""
    return json.dumps(report, ensure_ascii=False, allow_nan=False)
