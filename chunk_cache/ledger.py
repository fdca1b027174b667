"""Which records are in memory, what they weigh, and who may be evicted. No locks: the store's job."""

from __future__ import annotations

from collections import OrderedDict
from typing import NoReturn

from chunk_cache.errors import IntegrityError
from chunk_cache.keys import ChunkKey
from chunk_cache.records import ChunkKV


class Entry:
    """Book-keeping of one record."""

    __slots__ = ("detached", "hits", "pinned", "record", "refs", "used_at")

    def __init__(self, record: ChunkKV, pinned: bool, now: float) -> None:
        self.record = record
        self.pinned = pinned
        self.refs = 0
        self.hits = 0
        self.used_at = now
        # Dropped while leased: found by nobody, but its bytes are real until the last lease ends.
        self.detached = False


class Ledger:
    """READY records under a byte budget.

    ``bytes_now`` counts detached records too and never exceeds the budget. ``evictable`` holds
    exactly the keys that are neither in use nor pinned, least recently used first, so that an
    eviction costs the same however much is pinned.
    """

    def __init__(self, byte_budget: int) -> None:
        self.byte_budget = byte_budget
        self.bytes_now = 0
        self.pinned_bytes = 0
        self.num_in_use = 0
        """Records with a lease on them, detached ones included."""
        self.entries: dict[ChunkKey, Entry] = {}
        self.evictable: OrderedDict[ChunkKey, None] = OrderedDict()
        self._detached: set[Entry] = set()

    def insert(self, record: ChunkKV, pinned: bool, now: float) -> None:
        """Add a record; room must have been made."""
        self.entries[record.key] = Entry(record, pinned, now)
        self.bytes_now += record.num_bytes
        if pinned:
            self.pinned_bytes += record.num_bytes
        else:
            self.evictable[record.key] = None

    def take(self, entry: Entry) -> None:
        """Count one more user."""
        self.num_in_use += entry.refs == 0
        entry.refs += 1
        self.evictable.pop(entry.record.key, None)

    def give_back(self, entry: Entry, now: float) -> None:
        """Count one user less."""
        if entry.refs < 1:
            raise IntegrityError(f"chunk {entry.record.key} was released more often than leased")
        entry.refs -= 1
        if entry.refs:
            return
        self.num_in_use -= 1
        entry.used_at = now
        if entry.detached:
            self._detached.remove(entry)
            self.bytes_now -= entry.record.num_bytes
        elif not entry.pinned:
            self.evictable[entry.record.key] = None

    def victims(self, num_bytes: int) -> list[ChunkKey] | None:
        """Keys to drop, oldest first, so that ``num_bytes`` fit; ``None`` if dropping cannot help.

        All or nothing: evicting some and still not fitting would lose records for no gain.
        """
        over = self.bytes_now + num_bytes - self.byte_budget
        chosen: list[ChunkKey] = []
        for key in self.evictable:
            if over <= 0:
                break
            chosen.append(key)
            over -= self.entries[key].record.num_bytes
        return chosen if over <= 0 else None

    def drop(self, key: ChunkKey) -> ChunkKV:
        """Forget a record; one that is in use keeps its bytes until the last lease ends."""
        entry = self.entries.pop(key)
        self.evictable.pop(key, None)
        if entry.pinned:
            self.pinned_bytes -= entry.record.num_bytes
        if entry.refs:
            entry.detached = True
            self._detached.add(entry)
        else:
            self.bytes_now -= entry.record.num_bytes
        return entry.record

    def set_pinned(self, entry: Entry, pinned: bool) -> None:
        """Pin or unpin."""
        if entry.pinned == pinned:
            return
        entry.pinned = pinned
        if pinned:
            self.pinned_bytes += entry.record.num_bytes
            self.evictable.pop(entry.record.key, None)
        else:
            self.pinned_bytes -= entry.record.num_bytes
            if not entry.refs:
                self.evictable[entry.record.key] = None

    def check(self, *, expect_idle: bool) -> None:
        """Check accounting, eviction list and keys; see :meth:`MemoryStore.check_integrity`."""
        entries = self.entries.values()
        weight = sum(e.record.num_bytes for e in (*entries, *self._detached))
        if self.bytes_now != weight:
            _fail(f"bytes_now is {self.bytes_now}, the records weigh {weight}")
        if self.bytes_now > self.byte_budget:
            _fail(f"{self.bytes_now} bytes exceed the budget of {self.byte_budget}")
        if self.pinned_bytes != sum(e.record.num_bytes for e in entries if e.pinned):
            _fail("pinned_bytes is not the weight of the pinned records")
        if set(self.evictable) != {k for k, e in self.entries.items() if not (e.refs or e.pinned)}:
            _fail("the eviction list is not the records that are neither in use nor pinned")
        for key, entry in self.entries.items():
            if entry.refs < 0 or entry.detached:
                _fail(f"{key}: refs={entry.refs}, detached={entry.detached}")
            if entry.record.key != key:
                _fail(f"{key} holds the record of {entry.record.key}")
            if ChunkKey.of(key.namespace, entry.record.token_ids) != key:
                _fail(f"{key} is not the hash of its token ids")
        if self.num_in_use != sum(e.refs > 0 for e in entries) + len(self._detached):
            _fail(f"num_in_use is {self.num_in_use}, the records say otherwise")
        if any(not e.detached or e.refs < 1 for e in self._detached):
            _fail("a record waits for its last lease and has none")
        if expect_idle and self.num_in_use:
            leased = [str(k) for k, e in self.entries.items() if e.refs]
            _fail(f"still leased: {leased} and {len(self._detached)} dropped records")


def _fail(message: str) -> NoReturn:
    raise IntegrityError(f"store: {message}")
