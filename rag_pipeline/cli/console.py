"""What the command line prints: progress on stderr, results on stdout, errors as one line."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

Advance = Callable[..., None]
"""``advance(done=None, total=None, description=None)``: absolute progress of a running step."""


def emit_json(value: object) -> None:
    """Print one JSON object on stdout."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def say(text: str) -> None:
    """Print one line for a person, on stderr, so that stdout stays parseable."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def write(text: str) -> None:
    """Print a piece of the result on stdout at once (streamed answers)."""
    sys.stdout.write(text)
    sys.stdout.flush()


def write_error(text: str) -> None:
    """Print a piece on stderr at once (an answer streamed beside ``--json``)."""
    sys.stderr.write(text)
    sys.stderr.flush()


@contextlib.contextmanager
def step(description: str, *, total: int | None = None) -> Iterator[Advance]:
    """Show a progress bar (or a moving one when `total` is unknown) while a step runs.

    On a terminal the bar disappears into one line with the time taken; elsewhere (a log file, CI)
    only that line is printed, so logs stay short.
    """
    started = time.perf_counter()
    if not sys.stderr.isatty():

        def quiet(*, done: float = 0, total: float | None = None, description: str = "") -> None:
            del done, total, description

        yield quiet
        say(f"{description}: done in {time.perf_counter() - started:.1f} s")
        return

    # Imported here: `--help` must not pay for it.
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns: list[Any] = [TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()]
    if total is not None:
        columns.insert(2, MofNCompleteColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(description, total=total)

        def advance(
            *, done: float = 0, total: float | None = None, description: str = description
        ) -> None:
            bar.update(task, completed=done, total=total, description=description)

        yield advance
    say(f"{description}: done in {time.perf_counter() - started:.1f} s")
