"""Several tiers below memory as one: reads fall through, writes go to all, and nobody waits for either."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Self

from chunk_cache.errors import ChunkCacheError
from chunk_cache.keys import ChunkKey, KVContext, TokenIds
from chunk_cache.records import ChunkKV
from chunk_cache.tiers.background_writer import QUEUE_BYTES, BackgroundWriter
from chunk_cache.tiers.base import LayerReader, Member, Tier


class Found(NamedTuple):
    """A record in one tier of a chain, its header read."""

    tier: str
    reader: LayerReader


class _Link(NamedTuple):
    name: str
    tier: Tier
    writer: BackgroundWriter


class TierChain(Tier):
    """Tiers from the nearest (a disk) to the farthest (a remote store), each with a queue and a thread that writes.

    A look-up goes through the tiers in order; a tier that raises is passed over and counted. :meth:`put` puts the
    record into every queue and returns at once: a tier that cannot keep up loses the record and nothing else. What
    was found in a tier is written to those above it by :meth:`write_back`. :meth:`remove` reaches every queue and
    every tier, and raises if one refuses, after it has asked all.

    Parameters
    ----------
    tiers : mapping of str to Tier
        By name, the nearest first.
    count : callable
        Called with the name of a tier and an event, from any thread: those of :class:`BackgroundWriter`, and ``hit``,
        ``miss``, ``read_failed``.
    failed : callable
        Called with the name of a tier and what it refused.
    is_erased : callable
        As of :class:`BackgroundWriter`.
    used : callable
        As of :class:`BackgroundWriter`; told to every tier.
    wrote : callable
        Called with the name of a tier, bytes and seconds of every record that was written.
    order : callable
        Called with the names of the tiers, the nearest first, for each look-up; returns them in the order in which
        to look, such as the fastest first.
    group_of, is_pause : callable
        As of :class:`BackgroundWriter`.
    queue_bytes : int
        Most bytes that wait, per tier.
    """

    def __init__(
        self,
        tiers: Mapping[str, Tier],
        *,
        count: Callable[[str, str], None] = lambda tier, kind: None,
        failed: Callable[[str, Exception], None] = lambda tier, error: None,
        is_erased: Callable[[ChunkKV, str], bool] = lambda record, tenant: False,
        used: Callable[[float], Iterable[ChunkKey]] = lambda since: (),
        wrote: Callable[[str, int, float], None] = lambda tier, num_bytes, seconds: None,
        order: Callable[[list[str]], list[str]] = lambda names: names,
        group_of: Callable[[KVContext], str | None] = lambda context: None,
        is_pause: Callable[[], bool] = lambda: True,
        queue_bytes: int = QUEUE_BYTES,
    ) -> None:
        self._count = count
        self._failed = failed
        self._order = order

        def link(name: str, tier: Tier) -> _Link:
            writer = BackgroundWriter(
                tier,
                count=lambda kind: count(name, kind),
                failed=lambda error: failed(name, error),
                is_erased=is_erased,
                used=used,
                wrote=lambda num_bytes, seconds: wrote(name, num_bytes, seconds),
                group_of=group_of,
                is_pause=is_pause,
                queue_bytes=queue_bytes,
            )
            return _Link(name, tier, writer)

        self._links = [link(name, tier) for name, tier in tiers.items()]
        self.has_groups = any(tier.has_groups for tier in tiers.values())

    @classmethod
    def connect(cls, location: str, *, byte_budget: int, model: str) -> Self:
        """Refuse: a chain is made of tiers that are connected already.

        Raises
        ------
        ChunkCacheError
            Always.
        """
        raise ChunkCacheError("a chain of tiers has no location: connect its tiers")

    @property
    def tiers(self) -> dict[str, Tier]:
        """The tiers by name, the nearest first."""
        return {link.name: link.tier for link in self._links}

    # -- reading ------------------------------------------------------------------------------

    def find(self, key: ChunkKey, token_ids: TokenIds) -> Found | None:
        """Open a record in the first tier, by ``order``, that has it and whose header verifies; counted per tier."""
        tiers = self.tiers
        for name in self._order(list(tiers)):
            tier, reader = tiers[name], None
            try:
                reader = tier.open(key, token_ids)
            except Exception as error:  # a tier of another distribution may raise anything
                self._count(name, "read_failed")
                self._failed(name, error)
            else:
                self._count(name, "miss" if reader is None else "hit")
            if reader is not None:
                return Found(name, reader)
        return None

    def open(self, key: ChunkKey, token_ids: TokenIds) -> LayerReader | None:
        """Begin to read a record, from the nearest tier that has it."""
        found = self.find(key, token_ids)
        return None if found is None else found.reader

    def contains(self, key: ChunkKey) -> bool:
        """Whether any tier has a record; one that raises has none."""
        return any(self._ask(link, lambda tier: tier.contains(key), False) for link in self._links)

    def read(self, key: ChunkKey) -> ChunkKV | None:
        """Read a whole record from the nearest tier that has an undamaged one."""
        for link in self._links:
            record: ChunkKV | None = self._ask(link, lambda tier: tier.read(key), None)
            if record is not None and record.key == key:
                return record
        return None

    def token_ids(self, key: ChunkKey) -> TokenIds | None:
        """Token ids of a record, from the nearest tier that knows them."""
        for link in self._links:
            ids: TokenIds | None = self._ask(link, lambda tier: tier.token_ids(key), None)
            if ids is not None:
                return ids
        return None

    def seen_ids(self, key: ChunkKey) -> TokenIds | None:
        """Token ids that a record's KV was computed from, from the nearest tier that knows them."""
        for link in self._links:
            ids: TokenIds | None = self._ask(link, lambda tier: tier.seen_ids(key), None)
            if ids is not None:
                return ids
        return None

    def keys(self) -> Iterator[ChunkKey]:
        """Keys of all tiers, each once."""
        found: dict[ChunkKey, None] = {}
        for link in self._links:
            found.update(dict.fromkeys(link.tier.keys()))
        return iter(found)

    def size_of(self, key: ChunkKey) -> int:
        """Bytes of a record in the nearest tier that knows."""
        sizes = (self._ask(link, lambda tier: tier.size_of(key), 0) for link in self._links)
        return next(filter(None, sizes), 0)

    def describe(self, namespace: str) -> dict[str, Any] | None:
        """Fields of a namespace's context, from the nearest tier that was told."""
        told = (
            self._ask(link, lambda tier: tier.describe(namespace), None) for link in self._links
        )
        return next(filter(None, told), None)

    def members(self, group: str, known: Container[ChunkKey] = ()) -> list[Member]:
        """Records of a group in any tier, each once."""
        found: dict[ChunkKey, Member] = {}
        for link in self._links:
            if not link.tier.has_groups:
                continue
            told: list[Member] = self._ask(link, lambda tier: tier.members(group, known), [])
            found |= {member.key: member for member in told if member.key not in found}
        return list(found.values())

    def _ask(self, link: _Link, question: Callable[[Tier], Any], otherwise: Any) -> Any:
        try:
            return question(link.tier)
        except Exception as error:
            self._count(link.name, "read_failed")
            self._failed(link.name, error)
            return otherwise

    # -- writing ------------------------------------------------------------------------------

    def put(
        self, record: ChunkKV, *, context: KVContext | None = None, tenant: str | None = None
    ) -> bool:
        """Queue a record for every tier; ``False`` where no queue took it. Never waits, never raises.

        Raises
        ------
        ChunkCacheError
            Without a context: a queue cannot look one up later.
        """
        if context is None:
            raise ChunkCacheError("a chain of tiers needs the context of what is put into it")
        took = [link.writer.put(record, context, tenant or "") for link in self._links]
        return any(took)

    def write_back(
        self, record: ChunkKV, context: KVContext, tenant: str, *, found_in: str
    ) -> None:
        """Queue a record that was found in a tier for all tiers above it, those that were not looked at and have it apart."""
        for link in self._links:
            if link.name == found_in:
                return
            if not self._ask(link, lambda tier: tier.contains(record.key), False):
                link.writer.put(record, context, tenant)

    def remove(self, key: ChunkKey) -> bool:
        """Drop a record from every queue and every tier; ``False`` if it was nowhere.

        Raises
        ------
        OSError, ChunkCacheError
            If a tier refuses: the first refusal, when all others have removed it.
        """
        refused: Exception | None = None
        found = False
        for link in self._links:
            link.writer.forget(key)
            try:
                found |= link.tier.remove(key)
            except Exception as error:
                refused = refused or error
        if refused is not None:
            raise refused
        return found

    def sync(self) -> None:
        """Make removals survive a power cut; raises as :meth:`remove` does."""
        refused: Exception | None = None
        for link in self._links:
            try:
                link.tier.sync()
            except Exception as error:
                refused = refused or error
        if refused is not None:
            raise refused

    def used(self, keys: Iterable[ChunkKey]) -> None:
        """Note the use of records in every tier."""
        noted = list(keys)
        for link in self._links:
            with contextlib.suppress(Exception):
                link.tier.used(noted)

    def heed_queue(self, awaited: Callable[[], Sequence[ChunkKey]]) -> None:
        """Tell every tier."""
        for link in self._links:
            link.tier.heed_queue(awaited)

    def note_context(self, context: KVContext) -> None:
        """Tell every tier what a namespace stands for."""
        for link in self._links:
            link.tier.note_context(context)

    # -- the queues ---------------------------------------------------------------------------

    @property
    def pending(self) -> int:
        """Records that some tier does not have yet."""
        return sum(link.writer.pending for link in self._links)

    def queues(self) -> dict[str, tuple[int, int]]:
        """Records and bytes that wait, per tier."""
        return {link.name: (link.writer.pending, link.writer.pending_bytes) for link in self._links}

    def clear(self) -> None:
        """Forget what waits."""
        for link in self._links:
            link.writer.clear()

    def erase(self) -> None:
        """Forget what waits and must not reach a tier any more, as ``is_erased`` says."""
        for link in self._links:
            link.writer.erase()

    def drain(self, timeout_s: float) -> bool:
        """Wait until nothing waits, but no longer than `timeout_s` per tier."""
        done = [link.writer.drain(timeout_s) for link in self._links]
        return all(done)

    def close(self, timeout_s: float) -> bool:
        """Take nothing more, write what waits, and end; ``False`` where the time for all tiers together was too short.

        What was not written until then is in :meth:`queues`.
        """
        deadline = time.monotonic() + timeout_s
        for link in self._links:
            link.writer.close(0.0)
        ended = [link.writer.close(max(0.0, deadline - time.monotonic())) for link in self._links]
        return all(ended)
