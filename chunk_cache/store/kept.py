"""What stays in the memory store and what goes: pins, hints of the waiting queue, eviction by hand."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable

from chunk_cache.errors import ChunkCacheError
from chunk_cache.eviction import EvictionPolicy, WaitingJob
from chunk_cache.eviction.lru import LRUPolicy
from chunk_cache.keys import ChunkKey
from chunk_cache.matching import ChunkMatcher
from chunk_cache.store.builds import BuildTable
from chunk_cache.store.room import Room
from chunk_cache.store.stats import StoreStats


class KeptStore:
    """The state of a memory store, and what may be said of records that are READY.

    Room, builds and counters change together, under the one lock. :class:`~.writable.WritableStore` adds how records
    come in, :class:`MemoryStore` the looking up; the parameters are told there.
    """

    def __init__(
        self,
        byte_budget: int,
        *,
        matcher: ChunkMatcher | None = None,
        checksums: bool = False,
        build_timeout_s: float = 120.0,
        retry_failed_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
        slab: bool = False,
        eviction: EvictionPolicy | None = None,
    ) -> None:
        if byte_budget <= 0:
            raise ChunkCacheError(f"byte_budget={byte_budget}: give a positive number of bytes")
        if build_timeout_s <= 0 or retry_failed_s < 0:
            raise ChunkCacheError(
                f"build_timeout_s={build_timeout_s}, retry_failed_s={retry_failed_s}: "
                "the first must be positive, the second not negative"
            )
        self.matcher = matcher if matcher is not None else ChunkMatcher()
        self.checksums = checksums
        self._build_timeout_s = build_timeout_s
        self._clock = clock
        self._lock = threading.RLock()
        self._stats = StoreStats()
        self._room = Room(
            byte_budget,
            eviction or LRUPolicy(memory_bytes=byte_budget),
            self.matcher,
            self._stats,
            clock,
            slab=slab,
        )
        self._ledger = self._room.ledger
        self._builds = BuildTable(retry_failed_s)

    # -- hints --------------------------------------------------------------------------------

    @property
    def uses_queue(self) -> bool:
        """Whether the eviction policy wants :meth:`note_waiting`; if not, its caller saves the collecting."""
        return self._ledger.policy.uses_queue

    def note_waiting(self, jobs: Iterable[WaitingJob]) -> list[ChunkKey]:
        """Tell the eviction policy which requests wait, as a hint.

        The scheduler's hook calls it once per scheduling step in which the queue has changed: after the queue was
        ordered, before the step's requests are admitted. A job is named by its request and lists the chunk keys that
        it may load, READY or not, those of both variants too. Outdated or wrong hints cost hits only.

        Any thread may call. The store's lock is held meanwhile, for O(jobs in the window) and O(log n) per key of the
        jobs that came or went, and O(1) per key in the prefetch window. A policy that does not use the queue returns at
        once and looks at no job.

        Parameters
        ----------
        jobs : iterable of WaitingJob
            The whole queue, the next first.

        Returns
        -------
        list[ChunkKey]
            What the first jobs (the prefetch window) will read and is neither READY nor BUILDING here, the next first:
            worth fetching from a lower tier.
        """
        policy = self._ledger.policy
        if not policy.uses_queue:
            return []
        with self._lock:
            policy.note_queue(jobs)
            ready, building = self._ledger.entries, self._builds.building
            return [
                key
                for key in dict.fromkeys(k for job in policy.jobs_to_prefetch() for k in job.keys)
                if key not in ready and key not in building
            ]

    def awaited_keys(self) -> list[ChunkKey]:
        """Keys that waiting requests will read, READY or not, the next first: as of the last :meth:`note_waiting`."""
        with self._lock:
            return list(dict.fromkeys(self._ledger.policy.awaited()))

    # -- pins and eviction --------------------------------------------------------------------

    def pin(self, key: ChunkKey, *, ttl_s: float | None = None) -> bool:
        """Keep a READY record until :meth:`unpin`, or for so many seconds; ``False`` if it is not READY.

        A pin that has ended holds nothing: it is taken away when room is needed or somebody looks.
        """
        return self._set_pinned(key, True, ttl_s)

    def unpin(self, key: ChunkKey) -> bool:
        """Make a record evictable again, as if just used; ``False`` if it is not READY."""
        return self._set_pinned(key, False)

    def _set_pinned(self, key: ChunkKey, pinned: bool, ttl_s: float | None = None) -> bool:
        with self._lock:
            entry = self._ledger.entries.get(key)
            if entry is None:
                return False
            now = self._clock()
            self._ledger.set_pinned(entry, pinned, now, None if ttl_s is None else now + ttl_s)
            return True

    def evict(self, key: ChunkKey, *, force: bool = False) -> bool:
        """Drop one record by hand.

        Parameters
        ----------
        key : ChunkKey
            Which.
        force : bool
            Also drop a pinned one. A record in use is never dropped.

        Returns
        -------
        bool
            ``False`` if it is absent, in use, or pinned without ``force``.
        """
        with self._lock:
            self._room.end_pins()
            entry = self._ledger.entries.get(key)
            if entry is None or entry.refs or (entry.pinned and not force):
                return False
            self._stats.evicted_by_hand += 1
            self._room.drop(key)
            return True

    def erase(self, keys: Iterable[ChunkKey]) -> int:
        """Drop records whatever holds them; returns how many.

        A pinned one goes too. One that is in use is found by nobody from now on, and its memory is
        free when the last lease ends.
        """
        with self._lock:
            present = [key for key in keys if key in self._ledger.entries]
            for key in present:
                self._stats.evicted_by_hand += 1
                self._room.drop(key)
            return len(present)

    def clear(self) -> int:
        """Drop everything that is neither in use nor pinned; returns how many went."""
        with self._lock:
            self._room.end_pins()
            return sum(self.evict(key) for key in list(self._ledger.evictable()))
