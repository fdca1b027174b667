"""The frame of every benchmark: options, progress, the report, versions, and calls timed in turns.

A new benchmark brings its own measuring alone:

* a config, a frozen dataclass of numbers and texts with defaults, which refuses what it cannot measure;
  the string below a field is the help text of its option;
* ``run(config, progress)``, which returns JSON-ready numbers, and beside each median its ``n`` and a spread
  (:meth:`rag_eval.benchmarks.call_timer.CallTimer.report` has both);
* ``table(report)``, the same as text;
* a ``main(words=None)`` that joins them::

    parser = benchmark_parser("python -m rag_eval.benchmarks.NAME", __doc__)
    return run_benchmark(parser, Config, run, table, words)

What takes minutes is measured inside of :func:`keep_measured`, and the report has what that says of the end::

    with keep_measured(lambda: rows) as end:
        for size in config.sizes:
            rows[size] = measure(size)
    return {"rows": rows} | end.report()

The benchmark is then told from every other by its numbers only: a mistake is one line and exit code 2, a refusal
behind the options one line and 1. A run that is interrupted or fails on its way prints what it has, and ends with 130 or 1.
"""

from __future__ import annotations

import platform
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, TypeVar

from rag_eval.arguments import OneLineParser, parse_config
from rag_eval.benchmarks.call_timer import CallTimer
from rag_eval.command import (
    Progress,
    no_progress,
    print_report,
    refusals_in_one_line,
    say_progress,
)
from rag_pipeline.errors import RagPipelineError
from retrievers.errors import RetrievalError

if TYPE_CHECKING:
    import argparse

    from _typeshed import DataclassInstance

    Config = TypeVar("Config", bound=DataclassInstance)

Report = dict[str, Any]
"""JSON-ready numbers of a run; ``interrupted`` is true where it was broken off, ``failure`` says of what it failed."""


@dataclass(slots=True)
class MeasuringEnd:
    """How the measuring of a run ended.

    Attributes
    ----------
    interrupted : bool
        Whether it was told to end, by Ctrl-C or SIGTERM.
    failure : str
        One line: of what it failed; empty where it did not.
    """

    interrupted: bool = False
    failure: str = ""

    def report(self) -> Report:
        """Fields of the report: ``interrupted``, and ``failure`` where there is one."""
        said: Report = {"interrupted": self.interrupted}
        return said | {"failure": self.failure} if self.failure else said


@contextmanager
def keep_measured(measured: Callable[[], object]) -> Iterator[MeasuringEnd]:
    """Keep what is measured where the block is interrupted or fails; yields how it ended.

    Parameters
    ----------
    measured : callable
        Returns something that is true as soon as a report can be made. Until then every exception goes on.
    """
    end = MeasuringEnd()
    try:
        yield end
    except KeyboardInterrupt:
        if not measured():
            raise
        end.interrupted = True
    except Exception as error:
        if not measured():
            raise
        if not isinstance(error, RagPipelineError | RetrievalError):
            traceback.print_exc()  # nobody foresaw it, and a line does not say where it was
        end.failure = " ".join(str(error).split()) or type(error).__name__


def benchmark_parser(prog: str, text: str | None) -> OneLineParser:
    """Make a parser that describes a benchmark by the first line of its module's text."""
    return OneLineParser(prog=prog, description=(text or "").splitlines()[0])


@refusals_in_one_line
def run_benchmark(
    parser: argparse.ArgumentParser,
    kind: type[Config],
    run: Callable[[Config, Progress], Report],
    table: Callable[[Report], str],
    words: Sequence[str] | None,
) -> int:
    """Read the config, measure, and print the report.

    Parameters
    ----------
    parser : argparse.ArgumentParser
        Gets an option for each field of the config, and ``--json``.
    kind : type
        Dataclass of the config.
    run : callable
        Measures; its progress goes to stderr.
    table : callable
        The report as text.
    words : sequence of str or None
        The command line without the program; None for that of the process.

    Returns
    -------
    int
        Exit code; a mistake in the options ends the program with 2.
    """
    config, given = parse_config(parser, kind, words)
    return print_report(run(config, say_progress), table, as_json=given.json)


def versions_of(*names: str) -> dict[str, str]:
    """Versions of distributions by name; ``python`` is the interpreter's own."""
    return {
        name: platform.python_version() if name == "python" else version(name) for name in names
    }


def time_in_turns(
    calls: Mapping[str, Callable[[], object]], repeats: int, progress: Progress = no_progress
) -> dict[str, CallTimer]:
    """Time several calls in turns, so that a busy machine hits all alike.

    Parameters
    ----------
    calls : mapping of str to callable
        What is timed, by name.
    repeats : int
        Turns that count. One goes before them: it fills caches that a later call finds full.
    progress : callable
        Told of each turn.
    """
    timers = {name: CallTimer() for name in calls}
    for turn in range(repeats + 1):
        progress(f"turn {turn} of {repeats}" if turn else "warm-up")
        # Whoever comes second finds the machine a little warmer.
        for name in list(calls)[:: 1 if turn % 2 else -1]:
            (timers[name] if turn else CallTimer())(calls[name])
    return timers
