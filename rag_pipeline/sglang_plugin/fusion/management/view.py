"""What the tiers of an engine hold, as JSON: figures per tier, and one row per record."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

from chunk_cache import ChunkKey, ChunkState, GuardedTier, Tier, codec_named

if TYPE_CHECKING:
    from rag_pipeline.sglang_plugin.fusion.runtime.runtime import FusionRuntime, KnownPrefix

MEMORY = "memory"
"""Name of the first tier."""


def listed_tiers(runtime: FusionRuntime) -> dict[str, Tier]:
    """Tiers below memory that are this engine's to list: a remote store is shared, and may hold millions."""
    chain = runtime.tiers
    return {
        name: tier
        for name, tier in ({} if chain is None else chain.tiers).items()
        if not tier.is_shared
    }


def known_prefix(runtime: FusionRuntime, namespace: str) -> KnownPrefix | None:
    """Known prefix that a namespace stands for, for a thread: the scheduler may add one meanwhile."""
    while True:
        try:
            return runtime.prefix_of(namespace)
        except RuntimeError:  # the table changed while it was looked through
            continue


def tenants_of(tier: Tier, namespaces: set[str]) -> dict[str, str]:
    """Whose records namespaces of a tier are; empty for nobody in particular."""
    return {name: tier.tenant_of(name) for name in namespaces}


def figures(runtime: FusionRuntime, tenant: str | None) -> dict[str, Any]:
    """Chunks, bytes and hit rates of every tier, memory first.

    Parameters
    ----------
    runtime : FusionRuntime
        Of this process.
    tenant : str or None
        Count only what belongs to this tenant; then nothing else is told, for all other figures are everybody's.
    """
    if tenant is not None:
        return {"tiers": [_memory_of(runtime, tenant), *_below_of(runtime, tenant)]}
    counts = runtime.metrics.to_json()
    tiers = [_memory(runtime)]
    chain, listed = runtime.tiers, listed_tiers(runtime)
    queues = {} if chain is None else chain.queues()
    for name, tier in ({} if chain is None else chain.tiers).items():
        queued, queued_bytes = queues[name]
        row: dict[str, Any] = {
            "name": name,
            **_rates(counts.get(f"{name}.hit", 0), counts.get(f"{name}.miss", 0)),
            "written": counts.get(f"{name}.written", 0),
            "dropped": counts.get(f"{name}.dropped", 0),
            "failed": counts.get(f"{name}.read_failed", 0) + counts.get(f"{name}.write_failed", 0),
            "damaged": counts.get(f"{name}.damaged", 0) + counts.get(f"{name}.corrupt", 0),
            "read_bytes": counts.get(f"{name}.read_bytes", 0),
            "read_s": counts.get(f"{name}.read_us", 0) / 1e6,
            "written_bytes": counts.get(f"{name}.written_bytes", 0),
            "written_s": counts.get(f"{name}.written_us", 0) / 1e6,
            "queued": queued,
            "queued_bytes": queued_bytes,
        }
        if name in listed:
            keys, pins = list(tier.keys()), tier.pins()
            row |= {
                "chunks": len(keys),
                "bytes": sum(tier.sizes_of(keys)),
                "pinned_chunks": len(pins),
                "pinned_bytes": sum(tier.sizes_of(list(pins))),
            }
        if isinstance(tier, GuardedTier):
            row["guard"] = tier.stats()
        tiers.append(row)
    fetching = 0 if runtime.fetcher is None else runtime.fetcher.pending
    return {"tiers": tiers, "fetching": fetching, "missing": len(runtime.missing)}


def _memory(runtime: FusionRuntime) -> dict[str, Any]:
    stats = runtime.store.stats()
    listed = runtime.store.ls()
    lossy = sum(
        info.state is ChunkState.READY and not codec_named(info.codec).is_lossless
        for info in listed
    )
    return {
        "name": MEMORY,
        **_rates(stats.hits, stats.misses),
        "chunks": stats.chunks_now,
        "bytes": stats.bytes_now,
        "byte_budget": stats.byte_budget,
        "pinned_chunks": sum(info.pinned for info in listed),
        "pinned_bytes": stats.pinned_bytes_now,
        "pins_expired": stats.pins_expired,
        "in_use": stats.in_use_now,
        "stored": stats.inserted,
        "approximate_chunks": lossy,
        "upgraded": stats.upgraded,
        "evicted": stats.evicted,
        "damaged": stats.corrupt,
    }


def _rates(hits: int, misses: int) -> dict[str, Any]:
    rate = hits / (hits + misses) if hits + misses else None
    return {"hits": hits, "misses": misses, "hit_rate": rate}


def _memory_of(runtime: FusionRuntime, tenant: str) -> dict[str, Any]:
    rows = [info for info in runtime.store.ls() if info.state is ChunkState.READY]
    mine = [info for info in rows if runtime.store.tenant_of(info.key) == tenant]
    hits = sum(info.hits for info in mine)
    size = sum(info.num_bytes for info in mine)
    return {"name": MEMORY, "chunks": len(mine), "bytes": size, "hits": hits}


def _below_of(runtime: FusionRuntime, tenant: str) -> list[dict[str, Any]]:
    rows = []
    for name, tier in listed_tiers(runtime).items():
        keys = list(tier.keys())
        owners = tenants_of(tier, {key.namespace for key in keys})
        mine = [key for key in keys if owners[key.namespace] == tenant]
        rows.append({"name": name, "chunks": len(mine), "bytes": sum(tier.sizes_of(mine))})
    return rows


def rows(runtime: FusionRuntime, *, tier: str, keys: list[ChunkKey]) -> list[dict[str, Any]]:
    """One row per record: where it is, what it weighs there, whose it is, and how long it is pinned.

    Parameters
    ----------
    runtime : FusionRuntime
        Of this process.
    tier : str
        Only what this tier holds; empty for all.
    keys : list of ChunkKey
        Only these; empty for all.
    """
    found: dict[ChunkKey, dict[str, Any]] = {}
    wanted = set(keys)

    def row(key: ChunkKey, tenant: str) -> dict[str, Any]:
        start = {"key": key.digest, "namespace": key.namespace, "tenant": tenant}
        return found.setdefault(key, {**start, "num_tokens": key.num_tokens, "bytes": {}})

    if tier in ("", MEMORY):
        for info in runtime.store.ls():
            if info.state is ChunkState.READY and (not wanted or info.key in wanted):
                one = row(info.key, runtime.store.tenant_of(info.key))
                one["bytes"][MEMORY] = info.num_bytes
                one |= {"hits": info.hits, "in_use": info.in_use, "idle_s": round(info.idle_s, 3)}
                one["approximate"] = not codec_named(info.codec).is_lossless
                if info.pinned:
                    _note_pin(one, info.pin_ttl_s)
    for name, place in listed_tiers(runtime).items():
        if tier not in ("", name):
            continue
        held = [key for key in place.keys() if not wanted or key in wanted]  # noqa: SIM118 - not a mapping
        owners, pins = tenants_of(place, {key.namespace for key in held}), place.pins()
        for key, size in zip(held, place.sizes_of(held), strict=True):
            one = row(key, owners[key.namespace])
            one["bytes"][name] = size
            if key in pins:
                _note_pin(one, None if math.isinf(pins[key]) else pins[key] - time.time())
    for one in found.values():
        one.setdefault("pinned", False)
        one.setdefault("pin_ttl_s", None)
    return list(found.values())


def _note_pin(one: dict[str, Any], ttl_s: float | None) -> None:
    """Note the pin that ends last; None is one without an end."""
    others = one.get("pin_ttl_s", 0.0) if one.get("pinned") else 0.0
    ends = None if ttl_s is None or others is None else round(max(ttl_s, others), 3)
    one |= {"pinned": True, "pin_ttl_s": ends}
