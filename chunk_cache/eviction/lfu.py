"""Least frequently used first."""

from __future__ import annotations

from chunk_cache.eviction.base import EvictionPolicy, StoredItem


class LFUPolicy(EvictionPolicy):
    """The item with the fewest uses since it was stored goes first; among equals the least recently used.

    Uses do not fade: what was popular once stays long.
    """

    name = "lfu"

    def rank(self, item: StoredItem) -> tuple[int, ...]:
        """Rank by the number of uses, then by the last one."""
        return (item.uses, item.used)
