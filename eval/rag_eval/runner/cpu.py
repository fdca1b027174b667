"""CPU time of the engine's processes."""

from __future__ import annotations

import psutil


class EngineCpu:
    """Sums the CPU time of every process the engine has started.

    The scheduler does nearly all the work; tokeniser and detokeniser processes are counted too.
    The own process is left out: it holds the evaluation, too.
    """

    def __init__(self) -> None:
        self._processes = psutil.Process().children(recursive=True)

    def seconds(self) -> float:
        """User and system time since the processes started, in seconds (10 ms steps on Linux)."""
        total = 0.0
        for process in self._processes:
            try:
                times = process.cpu_times()
            except psutil.NoSuchProcess:
                continue
            total += times.user + times.system
        return total
