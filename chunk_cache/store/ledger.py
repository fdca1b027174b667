"""Which records are in memory, what they weigh, and who may be evicted. No locks: the store's job."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NoReturn

from chunk_cache.errors import IntegrityError
from chunk_cache.eviction import EvictionPolicy
from chunk_cache.keys import ChunkKey
from chunk_cache.records import ChunkKV
from chunk_cache.store.loading import LoadingChunk


class Entry:
    """Book-keeping of one record."""

    __slots__ = ("detached", "hits", "pinned", "record", "refs", "tenant", "used_at")

    def __init__(
        self, record: ChunkKV | LoadingChunk, pinned: bool, now: float, tenant: str
    ) -> None:
        self.record: ChunkKV | LoadingChunk = record
        self.tenant = tenant
        self.pinned = pinned
        self.refs = 0
        self.hits = 0
        self.used_at = now
        # Dropped while leased, or still loading: not READY, but its bytes are real until the last lease ends.
        self.detached = False


class Ledger:
    """READY records under a byte budget.

    ``bytes_now`` counts detached records too and never exceeds the budget. The policy's candidates are
    exactly the keys that are neither in use nor pinned, with one group per tenant, so that an eviction
    costs the same however much is pinned.
    """

    def __init__(self, byte_budget: int, policy: EvictionPolicy) -> None:
        self.byte_budget = byte_budget
        self.policy = policy
        self.bytes_now = 0
        self.pinned_bytes = 0
        self.num_in_use = 0
        """Records with a lease on them, detached ones included."""
        self.entries: dict[ChunkKey, Entry] = {}
        self.bytes_of: dict[str, int] = {}
        """Bytes that each tenant holds, leased, pinned and detached ones included; sums to ``bytes_now``."""
        self._detached: set[Entry] = set()

    def insert(self, record: ChunkKV, pinned: bool, now: float, tenant: str) -> None:
        """Add a record; room must have been made."""
        entry = self.entries[record.key] = Entry(record, pinned, now, tenant)
        self._weigh(entry, record.num_bytes)
        if pinned:
            self.pinned_bytes += record.num_bytes
        self.policy.insert(record.key, record.num_bytes, now=now, group=tenant, is_held=pinned)

    def reserve(self, loading: LoadingChunk, now: float, tenant: str) -> Entry:
        """Charge a record that arrives layer by layer; room must have been made. The caller is its first user."""
        entry = Entry(loading, False, now, tenant)
        entry.detached = True
        self._detached.add(entry)
        self._weigh(entry, loading.num_bytes)
        self.take(entry)
        return entry

    def attach(self, entry: Entry, record: ChunkKV, now: float) -> None:
        """Make a reserved record READY; its users go on using it, the caller among them."""
        self._detached.remove(entry)
        entry.detached = False
        self._weigh(entry, record.num_bytes - entry.record.num_bytes)
        entry.record = record
        self.entries[record.key] = entry
        self.policy.insert(record.key, record.num_bytes, now=now, group=entry.tenant, is_held=True)

    def _weigh(self, entry: Entry, num_bytes: int) -> None:
        self.bytes_now += num_bytes
        self.bytes_of[entry.tenant] = self.bytes_of.get(entry.tenant, 0) + num_bytes
        if not self.bytes_of[entry.tenant]:
            del self.bytes_of[entry.tenant]

    def evictable(self) -> Iterator[ChunkKey]:
        """Keys that are neither in use nor pinned."""
        for tenant in self.policy.groups():
            yield from self.policy.victims(tenant)

    def take(self, entry: Entry) -> None:
        """Count one more user."""
        self.num_in_use += entry.refs == 0
        entry.refs += 1
        if not entry.detached:
            self.policy.hold(entry.record.key)

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
            self._weigh(entry, -entry.record.num_bytes)
        elif not entry.pinned:
            self.policy.release(entry.record.key, now)

    def victims(self, num_bytes: int, tenant: str, now: float) -> list[ChunkKey] | None:
        """Keys to drop so that ``num_bytes`` of a tenant fit; ``None`` if dropping cannot help.

        Who would hold most, the new record counted, loses first, and the policy says which of its records; among
        equals the tenant that asks. So nobody is pushed out by a tenant that holds more. All or nothing: evicting some
        and still not fitting would lose records for no gain. The policy's reserve is freed as far as possible.
        """
        over = self.bytes_now + num_bytes - self.byte_budget
        spare = self.policy.reserve_bytes
        rows = {name: self.policy.victims(name, now) for name in self.policy.groups()}
        held = {name: self.bytes_of[name] for name in rows}
        held[tenant] = self.bytes_of.get(tenant, 0) + num_bytes
        chosen: list[ChunkKey] = []
        while over + spare > 0:
            most = max(held, key=lambda name: (held[name], name == tenant))
            key = next(rows.get(most, iter(())), None)
            if key is not None:
                chosen.append(key)
                weight = self.entries[key].record.num_bytes
                held[most] -= weight
                over -= weight
            elif most == tenant:
                # All of its own is in use or pinned.
                return chosen if over <= 0 else None
            else:
                del held[most]
        return chosen

    def drop(self, key: ChunkKey) -> ChunkKV | LoadingChunk:
        """Forget a record; one that is in use keeps its bytes until the last lease ends."""
        entry = self.entries.pop(key)
        self.policy.remove(key)
        if entry.pinned:
            self.pinned_bytes -= entry.record.num_bytes
        if entry.refs:
            entry.detached = True
            self._detached.add(entry)
        else:
            self._weigh(entry, -entry.record.num_bytes)
        return entry.record

    def set_pinned(self, entry: Entry, pinned: bool, now: float) -> None:
        """Pin or unpin."""
        if entry.pinned == pinned:
            return
        entry.pinned = pinned
        if pinned:
            self.pinned_bytes += entry.record.num_bytes
            self.policy.hold(entry.record.key)
        else:
            self.pinned_bytes -= entry.record.num_bytes
            if not entry.refs:
                self.policy.release(entry.record.key, now)

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
        self.policy.check()
        known = {(i.group, i.key, i.num_bytes, i.is_held) for i in self.policy.items.values()}
        told = {
            (e.tenant, key, e.record.num_bytes, bool(e.refs or e.pinned))
            for key, e in self.entries.items()
        }
        if known != told:
            _fail("the eviction candidates are not the records that are neither in use nor pinned")
        shares: dict[str, int] = {}
        for entry in (*entries, *self._detached):
            shares[entry.tenant] = shares.get(entry.tenant, 0) + entry.record.num_bytes
        if self.bytes_of != shares:
            _fail("bytes_of is not what the tenants' records weigh")
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
