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

It is then told from every other by its numbers only: a mistake is one line and exit code 2, a refusal
behind the options one line and 1, an interrupted run prints what it has and ends with 130.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, TypeVar

from rag_eval.arguments import OneLineParser, parse_config
from rag_eval.benchmarks.call_timer import CallTimer
from rag_eval.command import (
    Progress,
    broken_off,
    json_line,
    no_progress,
    refusals_in_one_line,
    say_progress,
)

if TYPE_CHECKING:
    import argparse

    from _typeshed import DataclassInstance

    Config = TypeVar("Config", bound=DataclassInstance)

Report = dict[str, Any]
"""JSON-ready numbers of a run; ``interrupted`` is true where it was broken off."""


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


def print_report(report: Report, table: Callable[[Report], str], *, as_json: bool) -> int:
    """Print a report on stdout, and return the exit code that goes with it."""
    print(json_line(report) if as_json else table(report), flush=True)
    return broken_off(measured=True) if report.get("interrupted") else 0


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
