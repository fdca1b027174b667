"""Belady's oracle: the item that is needed last goes first."""

from __future__ import annotations

import bisect
from collections.abc import Hashable, Mapping, Sequence

from chunk_cache.eviction.base import EvictionPolicy, StoredItem

_NEVER = 1 << 62


class BeladyPolicy(EvictionPolicy):
    """The item whose next use lies furthest ahead goes first (MIN; Belady, IBM Systems Journal 5(2), 1966).

    Nobody knows the future but a simulator, which bounds with it what any policy can reach. With one tier and items
    of one size no policy has more hits. With two tiers, several sizes or prompts that are found only up to their first
    missing block it is a good guess, not a bound.

    Parameters
    ----------
    memory_bytes, disk_bytes : int
        As of :class:`EvictionPolicy`.
    variant : str
        As of :class:`EvictionPolicy`.
    future : mapping of hashable to sequence of int
        By key the numbers of the jobs that use it, ascending.

    Attributes
    ----------
    job : int
        Number of the job that runs; the simulator sets it before it reports the job's uses.
    """

    name = "belady"
    needs_future = True

    def __init__(
        self,
        *,
        memory_bytes: int,
        disk_bytes: int = 0,
        variant: str = "",
        future: Mapping[Hashable, Sequence[int]],
    ) -> None:
        super().__init__(memory_bytes=memory_bytes, disk_bytes=disk_bytes, variant=variant)
        self._future = future
        self.job = -1

    def rank(self, item: StoredItem) -> tuple[int, ...]:
        """Rank by the distance of the next use, the longest first."""
        jobs = self._future.get(item.key, ())
        at = bisect.bisect_right(jobs, self.job)
        return (-jobs[at] if at < len(jobs) else -_NEVER, item.used)
