"""Least recently used first."""

from __future__ import annotations

from chunk_cache.eviction.base import EvictionPolicy, StoredItem


class LRUPolicy(EvictionPolicy):
    """The item whose last use lies furthest back goes first. The default of the memory store."""

    name = "lru"

    def rank(self, item: StoredItem) -> tuple[int, ...]:
        """Rank by the last use."""
        return (item.used,)
