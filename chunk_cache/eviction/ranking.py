"""Keys in the order of a rank that may change at any time."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Hashable, Iterator
from typing import Any

from chunk_cache.errors import IntegrityError

_MIN_STALE = 32
"""So many outdated entries are never worth a clean-up."""


class Ranking:
    """A priority queue whose entries can be changed and removed.

    A heap with lazy deletion: what was changed or removed stays in the heap as a stale entry and is skipped. Stale
    entries are cleaned up when they outnumber the others. So a change costs O(log n) amortised, and the next key of an
    iteration O(log n). Not thread-safe, and not to be changed while it is iterated.
    """

    __slots__ = ("_count", "_heap", "_live")

    def __init__(self) -> None:
        # The count makes each entry unique, so that keys are never compared.
        self._heap: list[tuple[tuple[Any, ...], int, Hashable]] = []
        self._live: dict[Hashable, tuple[tuple[Any, ...], int, Hashable]] = {}
        self._count = itertools.count()

    def __len__(self) -> int:
        return len(self._live)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._live

    def set(self, key: Hashable, rank: tuple[Any, ...]) -> None:
        """Add a key, or give it another rank. The smallest rank comes first, among equals the older entry."""
        entry = (rank, next(self._count), key)
        self._live[key] = entry
        heapq.heappush(self._heap, entry)
        self._clean_up()

    def discard(self, key: Hashable) -> bool:
        """Remove a key; ``False`` if it is not there."""
        if self._live.pop(key, None) is None:
            return False
        self._clean_up()
        return True

    def _clean_up(self) -> None:
        if len(self._heap) > 2 * len(self._live) + _MIN_STALE:
            self._heap = list(self._live.values())
            heapq.heapify(self._heap)

    def _is_stale(self, entry: tuple[tuple[Any, ...], int, Hashable]) -> bool:
        return self._live.get(entry[2]) is not entry

    def __iter__(self) -> Iterator[Hashable]:
        """Keys, the smallest rank first; each costs O(log n), and what is not asked for costs nothing."""
        heap = self._heap
        while heap and self._is_stale(heap[0]):
            heapq.heappop(heap)
        # A walk down the heap: the smallest entry that was not visited is a child of one that was.
        border = [(heap[0], 0)] if heap else []
        while border:
            entry, at = heapq.heappop(border)
            for child in (2 * at + 1, 2 * at + 2):
                if child < len(heap):
                    heapq.heappush(border, (heap[child], child))
            if not self._is_stale(entry):
                yield entry[2]

    def check(self) -> None:
        """Check that each key has its entry in the heap.

        Raises
        ------
        IntegrityError
            If not.
        """
        if set(self._live) != {entry[2] for entry in self._heap if not self._is_stale(entry)}:
            raise IntegrityError("eviction: the heap has not the keys that are ranked")
