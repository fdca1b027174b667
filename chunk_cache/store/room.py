"""The bytes of the memory store: where a record finds room, what goes for it, and how one takes another's place."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from chunk_cache.eviction import EvictionPolicy
from chunk_cache.keys import ChunkKey
from chunk_cache.matching import ChunkMatcher
from chunk_cache.records import ChunkKV
from chunk_cache.store.ledger import Ledger
from chunk_cache.store.loading import LoadingChunk
from chunk_cache.store.slab import Slab
from chunk_cache.store.stats import StoreStats


class Room:
    """Ledger, slab and matcher, which change together. No locks: the store's job.

    Parameters
    ----------
    byte_budget : int
        Most bytes of all records.
    eviction : EvictionPolicy
        Order of a tenant's victims.
    matcher : ChunkMatcher
        Kept in step with what is READY.
    stats : StoreStats
        Where evictions and refusals are counted.
    clock : callable
        Monotonic seconds.
    slab : bool
        Whether the tensors lie in one buffer.
    """

    def __init__(
        self,
        byte_budget: int,
        eviction: EvictionPolicy,
        matcher: ChunkMatcher,
        stats: StoreStats,
        clock: Callable[[], float],
        *,
        slab: bool,
    ) -> None:
        self.ledger = Ledger(byte_budget, eviction)
        self.slab = Slab(byte_budget) if slab else None
        self._matcher = matcher
        self._stats = stats
        self._clock = clock

    def make(self, record: ChunkKV, tenant: str) -> ChunkKV | None:
        """Evict what must go; return the record as it will be kept, ``None``, counted, where it has no room.

        The slab may lack it though enough was evicted: where a tensor that outlived its record is in the way.
        """
        if record.num_bytes > self.ledger.byte_budget:
            self._stats.rejected_too_big += 1
            return None
        victims = self._victims(record, tenant)
        for key in victims or ():
            self._stats.evicted += 1
            self._stats.evicted_bytes += self.drop(key).num_bytes
        stored = None
        if victims is not None:
            stored = record if self.slab is None else self.slab.adopt(record)
        self._stats.rejected_no_room += stored is None
        return stored

    def add(self, record: ChunkKV, tenant: str, *, pin: bool) -> None:
        """Make a record READY that :meth:`make` returned."""
        self._matcher.add(record.key, record.token_ids)
        self.ledger.insert(record, pin, self._clock(), tenant)

    def drop(self, key: ChunkKey) -> ChunkKV | LoadingChunk:
        """Forget a record, as :meth:`Ledger.drop`."""
        self._matcher.remove(key)
        return self.ledger.drop(key)

    def end_pins(self) -> None:
        """Unpin what was pinned until now, and count it."""
        if self.ledger.pin_ends:
            self._stats.pins_expired += self.ledger.end_pins(self._clock())

    def upgrade(self, record: ChunkKV, tenant: str, *, pin: bool) -> bool:
        """Put an exact record in the place of an approximate one, whose users keep it; its pin goes over.

        The approximate one stays, READY, where the other finds no room.
        """
        key = record.key
        old = self.ledger.entries[key]
        is_pinned, hits, until = old.pinned, old.hits, self.ledger.pin_ends.get(key)
        if not old.refs and record.num_bytes <= old.record.num_bytes:
            del old  # a slab has the room when nobody holds a tensor in it
            stored = self._make_in_place(record, tenant)
        else:
            self.ledger.take(old)  # nobody's victim meanwhile
            try:
                stored = self.make(record, tenant)
            finally:
                self.ledger.give_back(old, self._clock())
            if stored is not None:
                self.drop(key)
        if stored is None:
            return False
        self.add(stored, tenant, pin=pin or is_pinned)
        self._keep_on(key, hits, None if pin else until)
        self._stats.upgraded += 1
        return True

    def _make_in_place(self, record: ChunkKV, tenant: str) -> ChunkKV | None:
        """Give a record the room of the one of its key, which nobody leases; put that back where it does not fit.

        It does not where somebody holds a tensor of the old one beyond the lease: its block is then not free.
        """
        key = record.key
        entry = self.ledger.entries[key]
        old = entry.record
        assert isinstance(old, ChunkKV)  # READY
        owner, is_pinned, hits = entry.tenant, entry.pinned, entry.hits
        until = self.ledger.pin_ends.get(key)
        again = self.slab.reviver(old) if self.slab is not None else (lambda kept=old: kept)
        del entry, old
        self.drop(key)
        stored = None
        try:
            # A second time where the last tensor went after the first: nothing is in the way any more.
            stored = self.make(record, tenant)
            if stored is None and again() is None:
                stored = self.make(record, tenant)
        finally:
            revived = None if stored is not None else again()
            if revived is not None:
                self.add(revived, owner, pin=is_pinned)
                self._keep_on(key, hits, until)
        return stored

    def _keep_on(self, key: ChunkKey, hits: int, until: float | None) -> None:
        """Give a record that was just added the history of the one before it."""
        entry = self.ledger.entries[key]
        entry.hits = hits
        if entry.pinned and until is not None:
            self.ledger.pin_ends[key] = until

    def _victims(self, record: ChunkKV, tenant: str) -> list[ChunkKey] | None:
        """Keys to drop so that a record fits; with a slab, as few more as leave it room in one piece."""
        ledger, slab, now = self.ledger, self.slab, self._clock()
        self.end_pins()
        victims = ledger.victims(record.num_bytes, tenant, now)
        if slab is None or victims is None or self._fits(slab, record, victims):
            return victims
        # Who asks for more gets the same victims and then others, so the fewest are found by bisection.
        low, high, victims = record.num_bytes, ledger.byte_budget + 1, None
        while high - low > 1:
            middle = (low + high) // 2
            found = ledger.victims(middle, tenant, now)
            if found is None or self._fits(slab, record, found):
                high, victims = middle, found
            else:
                low = middle
        return victims

    def _fits(self, slab: Slab, record: ChunkKV, victims: Iterable[ChunkKey]) -> bool:
        stored = [self.ledger.entries[key].record for key in victims]
        return slab.fits(record, [one for one in stored if isinstance(one, ChunkKV)])
