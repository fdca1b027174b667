"""Timer of single calls: wall clock and CPU time of this process, call by call."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import numpy as np

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

    def report(self) -> dict[str, float | int]:
        """Milliseconds: smallest, median, 99th percentile and largest, and the number of calls."""
        wall, cpu = np.array(self.wall) * 1e3, np.array(self.cpu) * 1e3
        return {
            "wall_ms_min": round(float(wall.min()), 4),
            "wall_ms_p50": round(float(np.median(wall)), 4),
            "wall_ms_p99": round(float(np.percentile(wall, 99)), 4),
            "wall_ms_max": round(float(wall.max()), 4),
            "cpu_ms_p50": round(float(np.median(cpu)), 4),
            "cpu_ms_p99": round(float(np.percentile(cpu, 99)), 4),
            "cpu_ms_max": round(float(cpu.max()), 4),
            "n": len(self.wall),
        }
