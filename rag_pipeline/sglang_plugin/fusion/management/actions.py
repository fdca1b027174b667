"""What each order does; runs in a thread beside the scheduler, on parts that are safe to use from any thread."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from chunk_cache import (
    Candidate,
    ChunkKey,
    ChunkState,
    GuardedTier,
    KVContext,
    StoreFolder,
    Tier,
    pin_as_in,
)
from rag_pipeline.protocol.cache_order import CACHE_ACTIONS, CacheOrder, CacheOrderError
from rag_pipeline.sglang_plugin.fusion.management.memories import memories
from rag_pipeline.sglang_plugin.fusion.management.view import (
    MEMORY,
    figures,
    known_prefix,
    listed_tiers,
    rows,
)

if TYPE_CHECKING:
    from rag_pipeline.sglang_plugin.fusion.runtime.runtime import FusionRuntime

_WRITTEN_S = 10.0
"""Longest that a pin waits for records that are on their way to the disk, seconds."""
_FETCH_S = 60.0
"""Longest that a prefetch waits for a batch of records, seconds."""
_BATCH = 128
"""Records that are fetched at once: requests want the fetcher too."""


def carry_out(runtime: FusionRuntime, order: CacheOrder, keys: list[ChunkKey]) -> dict[str, Any]:
    """Carry out an order.

    Parameters
    ----------
    runtime : FusionRuntime
        Of this process.
    order : CacheOrder
        What to do.
    keys : list of ChunkKey
        What its words mean on this rank.

    Raises
    ------
    CacheOrderError
        With one line and an HTTP status.
    """
    if order.action not in CACHE_ACTIONS:
        raise CacheOrderError(f"no action {order.action!r}; allowed: {', '.join(CACHE_ACTIONS)}")
    chain = runtime.tiers
    names = [MEMORY, *(() if chain is None else chain.tiers)]
    if order.tier and order.tier not in names:
        raise CacheOrderError(
            f"no tier {order.tier[:64]!a} in this engine; allowed: {', '.join(names)}"
        )
    return _ACTIONS[order.action](runtime, order, keys)


def _below(runtime: FusionRuntime, order: CacheOrder) -> dict[str, Tier]:
    """Tiers below memory that an order is about; a shared one only where it is named."""
    chain = runtime.tiers
    if order.tier and chain is not None:
        return {name: tier for name, tier in chain.tiers.items() if name == order.tier}
    return {} if order.tier else listed_tiers(runtime)


def _stats(runtime: FusionRuntime, order: CacheOrder, keys: list[ChunkKey]) -> dict[str, Any]:
    return figures(runtime, order.tenant)


def _ls(runtime: FusionRuntime, order: CacheOrder, keys: list[ChunkKey]) -> dict[str, Any]:
    listed = [MEMORY, *listed_tiers(runtime)]
    if order.tier and order.tier not in listed:
        raise CacheOrderError(
            f"tier {order.tier!r} is shared by servers and cannot be listed here; allowed: {', '.join(listed)}"
        )
    found = rows(runtime, tier=order.tier, keys=keys)
    return {"total": len(found), "entries": found[order.offset : order.offset + order.limit]}


def _pin(runtime: FusionRuntime, order: CacheOrder, keys: list[ChunkKey]) -> dict[str, Any]:
    chain = runtime.tiers
    if chain is not None and chain.pending:
        chain.drain(_WRITTEN_S)  # what is not there yet could not be pinned there
    done: list[str] = []
    left: list[str] = []
    for key in keys:
        held = order.tier in ("", MEMORY) and runtime.store.pin(key, ttl_s=order.ttl_s)
        for tier in _below(runtime, order).values():
            held |= tier.pin(key, ttl_s=order.ttl_s)
        (done if held else left).append(key.digest)
    return {"pinned": done, "not_pinned": left, "ttl_s": order.ttl_s}


def _unpin(runtime: FusionRuntime, order: CacheOrder, keys: list[ChunkKey]) -> dict[str, Any]:
    pinned = {info.key for info in runtime.store.ls() if info.pinned}
    done = []
    for key in keys:
        was = order.tier in ("", MEMORY) and key in pinned and runtime.store.unpin(key)
        for tier in _below(runtime, order).values():
            was |= tier.unpin(key)
        if was:
            done.append(key.digest)
    return {"unpinned": done}


def _evict(runtime: FusionRuntime, order: CacheOrder, keys: list[ChunkKey]) -> dict[str, Any]:
    """Remove records; a pinned one or one in use stays everywhere, so that what is left is whole.

    What ``max_bytes`` trims leaves that tier only, and is told by it.
    """
    below, store, chain = _below(runtime, order), runtime.store, runtime.tiers
    folders = {name: tier for name, tier in below.items() if _is_folder(tier)}
    if order.max_bytes is not None and not folders:
        raise CacheOrderError("max_bytes bounds the folder on disk: give tier 'disk', or name keys")
    states = {info.key: info for info in store.ls() if info.state is ChunkState.READY}
    gone: list[str] = []
    pinned: list[str] = []
    used: list[str] = []
    for key in keys:
        info = states.get(key)
        if (info is not None and info.pinned) or any(t.is_pinned(key) for t in below.values()):
            pinned.append(key.digest)
            continue
        is_gone = False
        if order.tier in ("", MEMORY) and info is not None:
            is_gone = store.evict(key)
            if not is_gone and store.state(key) is ChunkState.READY:
                used.append(key.digest)
                continue
        if not order.tier and chain is not None:
            is_gone |= chain.remove(key)  # what waits to be written goes too
        else:
            for tier in below.values():
                is_gone |= tier.remove(key)
        if is_gone:
            gone.append(key.digest)
    result: dict[str, Any] = {"evicted": gone, "pinned_kept": pinned, "in_use_kept": used}
    if order.max_bytes is not None:
        result["trimmed"] = {
            name: [key.digest for key in folder.trim(order.max_bytes)]
            for name, folder in folders.items()
        }
    return result


def _is_folder(tier: Tier) -> bool:
    return isinstance(tier.tier if isinstance(tier, GuardedTier) else tier, StoreFolder)


def _verify(runtime: FusionRuntime, order: CacheOrder, keys: list[ChunkKey]) -> dict[str, Any]:
    """Read everything against its checksums; what is damaged is removed, and missed at its next use."""
    removed: dict[str, list[str]] = {}
    unchecked = 0
    if order.tier in ("", MEMORY):
        removed[MEMORY] = [key.digest for key in runtime.store.verify()]
        # Without a checksum nobody can tell.
        unchecked = 0 if runtime.store.checksums else len(runtime.store)
    for name, tier in _below(runtime, order).items():
        removed[name] = [key.digest for key in tier.verify(remove=True)]
        if removed[name]:
            runtime.metrics.count_tier(name, "damaged", len(removed[name]))
    return {"damaged_removed": removed, "memory_without_checksum": unchecked}


def _prefetch(runtime: FusionRuntime, order: CacheOrder, keys: list[ChunkKey]) -> dict[str, Any]:
    """Bring records into memory from below, as a request would; what is evicted for it, the policy says."""
    fetcher, chain, store = runtime.fetcher, runtime.tiers, runtime.store
    if fetcher is None or chain is None:
        raise CacheOrderError("this engine has no tier below memory to fetch from", 409)
    there = [key for key in keys if store.state(key) is ChunkState.READY]
    wanted: list[Candidate] = []
    left: list[str] = []
    for key in keys:
        if key in there:
            continue
        context, ids = _context(runtime, key.namespace), chain.token_ids(key)
        if context is None or ids is None:
            left.append(key.digest)  # of another model, rank or tenant: of no use here
        else:
            wanted.append(Candidate(key, ids, context, chain.tenant_of(key.namespace)))
    for start in range(0, len(wanted), _BATCH):
        fetches = fetcher.begin([[one] for one in wanted[start : start + _BATCH]])
        fetcher.wait(lambda begun=fetches: all(f.is_ended for f in begun), _FETCH_S)  # type: ignore[misc]
    arrived = [one.key for one in wanted if store.state(one.key) is ChunkState.READY]
    for key in arrived:
        for tier in listed_tiers(runtime).values():
            pin_as_in(tier, store, key)
    ready = [key.digest for key in arrived]
    left += [one.key.digest for one in wanted if one.key.digest not in set(ready)]
    return {
        "fetched": ready,
        "already_there": [key.digest for key in there],
        "not_fetched": left,
    }


def _context(runtime: FusionRuntime, namespace: str) -> KVContext | None:
    """Context of a namespace that this engine's requests may use; of a tenant's only what it has asked for itself.

    A folder tells no tenant's salt, without which what is fetched could not be written to another tier.
    """
    known, chain, facts = known_prefix(runtime, namespace), runtime.tiers, runtime.facts
    if known is not None:
        return known.context
    fields = None if chain is None else chain.describe(namespace)
    if fields is None or facts is None or fields.get("tenant"):
        return None
    context = facts.context(prefix_digest=str(fields.get("prefix_digest")), tenant="")
    return context if context.namespace == namespace else None


_ACTIONS: dict[str, Callable[[FusionRuntime, CacheOrder, list[ChunkKey]], dict[str, Any]]] = {
    "stats": _stats,
    "ls": _ls,
    "pin": _pin,
    "unpin": _unpin,
    "prefetch": _prefetch,
    "evict": _evict,
    "verify": _verify,
    "memories": lambda runtime, order, keys: {**memories(runtime, order)},
}
