"""A tier that may hang or be gone: reading it costs one bounded wait, then nothing until it answers again."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import Any, Self

from chunk_cache.keys import ChunkKey, KVContext, TokenIds
from chunk_cache.records import ChunkKV
from chunk_cache.tiers.base import LayerReader, Member, Tier
from chunk_cache.tiers.breaker import CircuitBreaker
from chunk_cache.tiers.deadline import BoundedCalls
from chunk_cache.tiers.guarded_calls import LONG_WAITS, GuardedCalls
from chunk_cache.tiers.guarded_reader import GuardedReader

WAIT_S = 1.0
"""Longest that a look-up waits for its answer, seconds."""
HANG_S = 2.0
"""The same for a folder, which a busy disk may keep waiting: as long as forwards wait for all records of a request."""
CONNECT_S = 120.0
"""Longest that a folder may take to be opened and listed, seconds; 100,000 records take three."""


class GuardedTier(GuardedCalls, Tier):
    """Any tier behind a :class:`CircuitBreaker`.

    Reading (`contains`, `get`, `read`, `open`, `token_ids`, `size_of`, `sizes_of`, `members`, `pinned_until`, `used`) never raises
    and is a miss where the tier fails. Everything else raises :class:`OSError` at once where the tier is known to be
    down: whoever writes counts it, and whoever erases must hear that nothing was erased.

    **A place that hangs.** A server's client has time-outs of its own; a folder has none (a network folder, a disk that
    dies). With `may_hang` every call but :meth:`put` runs in a thread that may be left behind. Then only a call that
    does not return, or a time-out of the system, opens the breaker: a disk that is full, or refuses one file, still
    answers for the others. A hung :meth:`put` holds up the one thread that writes, and nobody else: if it were given up,
    it might still write, later, what was erased meanwhile.

    Parameters
    ----------
    tier : Tier
        What to guard.
    name : str
        For messages; without secrets.
    breaker : CircuitBreaker, optional
        One of its own by default.
    wait_s : float
        Longest that a look-up waits, seconds. Layers wait as long as the tier's own reader does, and no longer than
        this where it may hang.
    may_hang : bool
        Whether its calls need a bound from outside.
    is_shared : bool
        Whether it is a place that several servers share, which is not this engine's to list.

    Attributes
    ----------
    counts : Counter of str
        ``hits``, ``misses``, ``damaged``, ``gone`` (while it was read), ``timeouts``, ``failures``, ``skipped`` (not
        asked, it was down), ``layers`` and ``bytes`` that were read, ``opened`` and ``closed`` of the breaker.
    """

    def __init__(
        self,
        tier: Tier,
        *,
        name: str,
        breaker: CircuitBreaker | None = None,
        wait_s: float = WAIT_S,
        may_hang: bool = False,
        is_shared: bool = True,
    ) -> None:
        super().__init__(name, breaker or CircuitBreaker(), wait_s=wait_s, may_hang=may_hang)
        self.tier = tier
        self.is_shared = is_shared
        self.has_groups = tier.has_groups

    @classmethod
    def connect(cls, location: str, *, byte_budget: int, model: str) -> Self:
        """Guard the tier ``disk``; others are opened first, and then guarded."""
        from chunk_cache.tiers.base import TIERS

        tier = TIERS.get("disk").connect(location, byte_budget=byte_budget, model=model)
        return cls.of_folder(tier, name=location)

    @classmethod
    def of_folder(cls, tier: Tier, *, name: str) -> Self:
        """Guard a place of this engine's own on a disk, which has no time-outs."""
        return cls(tier, name=name, wait_s=HANG_S, may_hang=True, is_shared=False)

    @classmethod
    def open_folder(cls, connect: Callable[[], Tier], *, name: str) -> Self:
        """Open such a place and guard it; the opening has a bound too.

        Raises
        ------
        ChunkCacheError, OSError
            What opening raised; :class:`TimeoutError` where it takes longer than :data:`CONNECT_S`.
        """
        return cls.of_folder(BoundedCalls(1).run(connect, CONNECT_S), name=name)

    # -- reading: a miss at worst ---------------------------------------------------------------

    def contains(self, key: ChunkKey) -> bool:
        """Ask; ``False`` where the tier does not answer."""
        return self._ask(lambda: self.tier.contains(key), False)

    def read(self, key: ChunkKey) -> ChunkKV | None:
        """Read a whole record; ``None`` where the tier does not answer either."""
        return self._found(self._ask(lambda: self.tier.read(key), None, waits=LONG_WAITS))

    def get(self, key: ChunkKey, token_ids: TokenIds) -> ChunkKV | None:
        """Read a whole record of these tokens; ``None`` where the tier does not answer either."""
        return self._found(self._ask(lambda: self.tier.get(key, token_ids), None, waits=LONG_WAITS))

    def open(self, key: ChunkKey, token_ids: TokenIds) -> LayerReader | None:
        """Begin to read a record; ``None`` where the tier does not answer either."""
        reader = self._found(self._ask(lambda: self.tier.open(key, token_ids), None))
        return None if reader is None else GuardedReader(self, reader)

    def token_ids(self, key: ChunkKey) -> TokenIds | None:
        """Token ids of a record; ``None`` where the tier does not answer either."""
        return self._ask(lambda: self.tier.token_ids(key), None)

    def seen_ids(self, key: ChunkKey) -> TokenIds | None:
        """Token ids that a record's KV was computed from; ``None`` where the tier does not answer either."""
        return self._ask(lambda: self.tier.seen_ids(key), None)

    def size_of(self, key: ChunkKey) -> int:
        """Bytes of a record; 0 where the tier does not answer either."""
        return self._ask(lambda: self.tier.size_of(key), 0)

    def sizes_of(self, keys: Sequence[ChunkKey]) -> list[int]:
        """Bytes of records; 0 for all where the tier does not answer."""
        return self._ask(lambda: self.tier.sizes_of(keys), [0] * len(keys), waits=LONG_WAITS)

    def members(self, group: str, known: Container[ChunkKey] = ()) -> list[Member]:
        """Records of a group; none where the tier does not answer either."""
        return self._ask(lambda: self.tier.members(group, known), [])

    def pinned_until(self, key: ChunkKey) -> float:
        """When a record's pin ends; 0 where the tier does not answer either."""
        return self._ask(lambda: self.tier.pinned_until(key), 0.0)

    def used(self, keys: Iterable[ChunkKey]) -> None:
        """Note use, if the tier answers."""
        noted = list(keys)
        self._ask(lambda: self.tier.used(noted), None, waits=LONG_WAITS)

    def heed_queue(self, awaited: Callable[[], Sequence[ChunkKey]]) -> None:
        """Let the waiting queue say what is evicted last; asks nobody now."""
        self.tier.heed_queue(awaited)

    # -- the rest: raises where the tier is down ------------------------------------------------

    def put(
        self, record: ChunkKV, *, context: KVContext | None = None, tenant: str | None = None
    ) -> bool:
        """Write a record.

        Raises
        ------
        OSError
            At once where the tier is known to be down.
        """
        return self._call(lambda: self.tier.put(record, context=context, tenant=tenant), None)

    def remove(self, key: ChunkKey) -> bool:
        """Drop a record.

        Raises
        ------
        OSError
            At once where the tier is known to be down: the record is still there.
        """
        return self.demand(lambda: self.tier.remove(key))

    def keys(self) -> Iterator[ChunkKey]:
        """Keys of all records.

        Raises
        ------
        OSError
            Where the tier is down: no keys and no answer are not the same.
        """
        return iter(self.demand(lambda: list(self.tier.keys())))

    def keys_by_use(self) -> list[ChunkKey]:
        """All keys, the longest unused first; raises as :meth:`keys`."""
        return self.demand(self.tier.keys_by_use)

    def note_context(self, context: KVContext) -> None:
        """Keep what a namespace stands for; raises as :meth:`put`."""
        self.demand(lambda: self.tier.note_context(context))

    def note_member(self, group: str, key: ChunkKey) -> None:
        """Note that a record belongs to a group; raises as :meth:`put`."""
        self.demand(lambda: self.tier.note_member(group, key))

    def describe(self, namespace: str) -> dict[str, Any] | None:
        """Fields of a namespace's context; raises as :meth:`keys`."""
        return self.demand(lambda: self.tier.describe(namespace))

    def namespaces(self, fields: Mapping[str, Any]) -> frozenset[str]:
        """Namespaces with these fields; raises as :meth:`keys`."""
        return self.demand(lambda: self.tier.namespaces(fields))

    def tenant_of(self, namespace: str) -> str:
        """Tenant of a namespace; raises as :meth:`keys`."""
        return self.demand(lambda: self.tier.tenant_of(namespace))

    def sync(self) -> None:
        """Make removals last; raises as :meth:`remove`."""
        self.demand(self.tier.sync)

    def pin(self, key: ChunkKey, *, ttl_s: float | None = None) -> bool:
        """Keep a record; raises as :meth:`put`."""
        return self.demand(lambda: self.tier.pin(key, ttl_s=ttl_s))

    def unpin(self, key: ChunkKey) -> bool:
        """Make a record evictable again; raises as :meth:`put`."""
        return self.demand(lambda: self.tier.unpin(key))

    def pins(self) -> dict[ChunkKey, float]:
        """Records that are pinned; raises as :meth:`keys`."""
        return self.demand(self.tier.pins)

    def is_damaged(self, key: ChunkKey) -> bool:
        """Read a record for its checksums; raises as :meth:`keys`."""
        return self.demand(lambda: self.tier.is_damaged(key))

    def sweep(self) -> int:
        """Remove what crashes left; raises as :meth:`remove`."""
        return self.demand(self.tier.sweep)

    def trim(self, byte_budget: int) -> list[ChunkKey]:
        """Remove records until the rest fits; raises as :meth:`remove`."""
        return self.demand(lambda: self.tier.trim(byte_budget))
