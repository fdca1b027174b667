"""Whole stores: from memory into a lower tier, and from a tier into memory."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Container, Iterable

from chunk_cache.keys import ChunkKey, KVContext
from chunk_cache.store.builds import ChunkState
from chunk_cache.store.memory import MemoryStore
from chunk_cache.tiers.base import Tier


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StoreLoadReport:
    """What became of every file of a load."""

    loaded: int = 0
    already_there: int = 0
    no_room: int = 0
    """The budget has no room without evicting: an import never pushes out what is in memory."""
    corrupt: int = 0
    foreign: int = 0
    """Of another model, rank or tenant than asked for."""

    def to_json(self) -> dict[str, int]:
        """Return all fields as a dict."""
        return dataclasses.asdict(self)


def export_store(
    tier: Tier,
    store: MemoryStore,
    *,
    keys: Iterable[ChunkKey] | None = None,
    contexts: Iterable[KVContext] = (),
    progress: Callable[[int], None] | None = None,
) -> int:
    """Write records of a memory store; records that are there already are kept as they are.

    Parameters
    ----------
    tier : Tier
        Where to.
    store : MemoryStore
        Where from.
    keys : iterable of ChunkKey, optional
        Which; by default all that are READY.
    contexts : iterable of KVContext
        Contexts to describe beside their chunks, for people and listings.
    progress : callable, optional
        Called with the number of chunks done so far.

    Returns
    -------
    int
        Number of records written.
    """
    for context in contexts:
        tier.note_context(context)
    written = 0
    for done, key in enumerate(store.keys() if keys is None else keys, start=1):
        if not tier.contains(key):
            with store.borrow(key) as record:
                if record is not None:
                    written += tier.put(record)
        if progress is not None:
            progress(done)
    return written


def load_store(
    tier: Tier,
    store: MemoryStore,
    *,
    namespaces: Container[str] | None = None,
    pin: bool = False,
    progress: Callable[[int], None] | None = None,
) -> StoreLoadReport:
    """Read records into a memory store until its budget is full; nothing is evicted for it.

    Pinned records come first, and are pinned in memory too, for as long as there; then the most recently used.

    Parameters
    ----------
    tier : Tier
        Where from.
    store : MemoryStore
        Where to.
    namespaces : container of str, optional
        Only chunks of these :attr:`KVContext.namespace`; by default all.
    pin : bool
        Pin everything that is loaded.
    progress : callable, optional
        Called with the number of files done so far.
    """
    counts = dict.fromkeys((field.name for field in dataclasses.fields(StoreLoadReport)), 0)
    wanted: list[tuple[bool, ChunkKey]] = []
    now = time.time()
    pins = {key for key, until in tier.pins().items() if until > now}
    for key in reversed(tier.keys_by_use()):
        if namespaces is None or key.namespace in namespaces:
            wanted.append((key not in pins, key))
        else:
            counts["foreign"] += 1
    wanted.sort(key=lambda row: row[0])
    sizes = tier.sizes_of([key for _, key in wanted])
    for done, ((loose, key), size) in enumerate(zip(wanted, sizes, strict=True), start=1):
        if store.state(key) in (ChunkState.READY, ChunkState.BUILDING):
            counts["already_there"] += 1
            if not loose:
                pin_as_in(tier, store, key)
        elif size > store.free_bytes:
            counts["no_room"] += 1
        else:
            record = tier.read(key)
            if record is None or record.key != key:
                counts["corrupt"] += 1
                store.count_corrupt()
            else:
                # Asked first: `put` would make room by evicting what was loaded before.
                fits = record.num_bytes <= store.free_bytes
                tenant = tier.tenant_of(key.namespace)
                put = fits and store.put(record, pin=pin or not loose, tenant=tenant)
                if put and not (loose or pin):
                    pin_as_in(tier, store, key)
                counts["loaded" if put else "no_room"] += 1
        if progress is not None:
            progress(done)
    return StoreLoadReport(**counts)


def pin_as_in(tier: Tier, store: MemoryStore, key: ChunkKey) -> None:
    """Pin in memory what is pinned in a tier, for as long; the two have different clocks."""
    until = tier.pinned_until(key)
    if until:
        store.pin(key, ttl_s=None if math.isinf(until) else until - time.time())
