"""The window formulas of CachedAttention."""

from __future__ import annotations

_LONG_AGO = 1000
"""The mean follows the last jobs of about this number, so that it keeps up with a load that changes."""


def prefetch_window(memory_bytes: int, job_bytes: float) -> int:
    """Jobs at the head of the queue whose KV fits in memory: ``L_pw = C_mem / S_kv``.

    Parameters
    ----------
    memory_bytes : int
        Memory that prefetching may fill, ``C_mem``.
    job_bytes : float
        Mean KV size of a job, ``S_kv``, bytes; positive.

    Returns
    -------
    int
        Whole jobs.
    """
    return int(memory_bytes / job_bytes)


def eviction_window(memory_bytes: int, disk_bytes: int, job_bytes: float) -> int:
    """Jobs at the head of the queue whose KV fits in the store: ``W = (C_mem + C_disk) / S_kv``.

    Parameters
    ----------
    memory_bytes, disk_bytes : int
        Budgets of the tiers, ``C_mem`` and ``C_disk``.
    job_bytes : float
        Mean KV size of a job, ``S_kv``, bytes; positive.

    Returns
    -------
    int
        Whole jobs.
    """
    return int((memory_bytes + disk_bytes) / job_bytes)


class RunningMean:
    """A mean of all values first, and one that follows the latest after many."""

    __slots__ = ("_count", "value")

    def __init__(self) -> None:
        self.value = 0.0
        """0 before the first value."""
        self._count = 0

    def add(self, value: float) -> None:
        """Count one value."""
        self._count = min(self._count + 1, _LONG_AGO)
        self.value += (value - self.value) / self._count
