"""Timer of single calls: wall clock and CPU time of this process, call by call."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import ParamSpec, TypeVar

import numpy as np

_PERCENT = {"min": 0, "p50": 50, "p99": 99, "max": 100}
_REPORTED = (
    *(f"wall_ms_{quantity}" for quantity in _PERCENT),
    *("cpu_ms_p50", "cpu_ms_p99", "cpu_ms_max", "n"),
)
_P = ParamSpec("_P")
_R = TypeVar("_R")


class CallTimer:
    """Collects wall and CPU seconds of single calls; call it with a function and its arguments."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def __call__(self, call: Callable[_P, _R], *args: _P.args, **kwargs: _P.kwargs) -> _R:
        """Time one call, and return what it returns."""
        cpu, wall = time.process_time(), time.perf_counter()
        result = call(*args, **kwargs)
        self.note(time.perf_counter() - wall, time.process_time() - cpu)
        return result

    def note(self, wall_s: float, cpu_s: float) -> None:
        """Count a call that was timed elsewhere, or several as one."""
        self.wall.append(wall_s)
        self.cpu.append(cpu_s)

    def report(self, *names: str) -> dict[str, float | int]:
        """Milliseconds, and the number of calls.

        Parameters
        ----------
        *names : str
            What to report of ``wall_ms_QUANTITY``, ``cpu_ms_QUANTITY`` and ``n``; a quantity is
            ``min``, ``p50``, ``p99`` or ``max``. All but the smallest CPU time when none is given.
        """
        found: dict[str, float | int] = {}
        for clock, seconds in (("wall", self.wall), ("cpu", self.cpu)):
            for quantity, percent in _PERCENT.items():
                value = 1e3 * float(np.percentile(seconds, percent))
                found[f"{clock}_ms_{quantity}"] = round(value, 4)
        found["n"] = len(self.wall)
        return {name: found[name] for name in names or _REPORTED}


def timer_line(report: Mapping[str, float | int]) -> str:
    """One timer's report as part of a line."""
    return (
        f"median {report['wall_ms_p50']:9.4f} ms   p99 {report['wall_ms_p99']:9.4f}"
        f"   max {report['wall_ms_max']:9.4f}   CPU {report['cpu_ms_p50']:9.4f}"
        f" p99 {report['cpu_ms_p99']:9.4f}   n={report['n']}"
    )
