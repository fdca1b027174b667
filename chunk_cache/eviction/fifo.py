"""First stored, first out."""

from __future__ import annotations

from chunk_cache.eviction.base import EvictionPolicy, StoredItem


class FIFOPolicy(EvictionPolicy):
    """The item of the oldest session goes first, whatever was used meanwhile.

    Within a session the least recently used goes first. An item that is dropped and stored again is as old as what is
    left of its session.
    """

    name = "fifo"

    def rank(self, item: StoredItem) -> tuple[int, ...]:
        """Rank by the birth of the session."""
        return (item.born, item.used)
