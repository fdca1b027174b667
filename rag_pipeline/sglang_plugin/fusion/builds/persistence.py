"""Chunk KV that outlives the engine: read from a tier at start, written there when it is made.

The tier (``fusion.tier``; by default a folder on the disk) is a cache of a cache: whatever goes wrong with it is logged once, counted, and serving goes on.
Reading fills the memory store up to its budget, the most recently used records first, and evicts nothing. Only
records that this model, on this rank, can use are read. Writing is a thread's work (:class:`chunk_cache.BackgroundWriter`):
the scheduler never waits for the disk.
"""

from __future__ import annotations

import logging
from typing import Any

from chunk_cache import TIERS, BackgroundWriter, ChunkKV, Tier, load_store
from rag_pipeline.sglang_plugin.fusion.builds import erased
from rag_pipeline.sglang_plugin.fusion.runtime.runtime import FusionRuntime

logger = logging.getLogger(__name__)


def open_folder(runtime: FusionRuntime, model: str) -> None:
    """Open the configured folder, read what fits and start the writer; watch for erased text in any case.

    Parameters
    ----------
    runtime : FusionRuntime
        Of this process.
    model : str
        Folder of the tokenizer.
    """
    if not runtime.is_on:
        return
    # Before the folder is read: what is erased meanwhile is erased from what was read too.
    runtime.erased = erased.ErasedText(runtime, model)
    path = runtime.config.store_dir
    if path:
        _read(runtime, path, model)
    runtime.erased.watch()


def _read(runtime: FusionRuntime, path: str, model: str) -> None:
    assert runtime.erased is not None
    try:
        tier = TIERS.get(runtime.config.tier).connect(
            path, byte_budget=runtime.config.store_dir_bytes, model=model
        )
        report = load_store(tier, runtime.store, namespaces=_usable(runtime, tier))
    except Exception as error:  # a tier of another distribution may raise anything
        told = error if isinstance(error, ValueError | OSError) else repr(error)
        logger.error("Chunk-KV folder %s is not used: %s", path, told)
        runtime.metrics.count("disk", "unusable")
        return
    runtime.writer = BackgroundWriter(
        tier,
        count=lambda kind: runtime.metrics.count("disk", kind),
        failed=lambda error: runtime.say_once("disk", "Chunk KV is not written to disk: %s", error),
        is_erased=runtime.erased.is_in,
        used=runtime.store.used_since,
    )
    for name, number in report.to_json().items():
        runtime.metrics.count("disk", name, number)
    logger.info("Chunk-KV folder %s: %s", path, report.to_json())


def keep(runtime: FusionRuntime, record: ChunkKV) -> None:
    """Have a record written that was just stored; a disk that cannot keep up costs the copy, not the request."""
    if runtime.writer is None:
        return
    prefix = runtime.prefix_of(record.key.namespace)
    if prefix is not None:
        runtime.writer.put(record, prefix.context, prefix.tenant.owner)


def pending(runtime: FusionRuntime) -> int:
    """Records that are not on the disk yet."""
    return runtime.writer.pending if runtime.writer is not None else 0


def _usable(runtime: FusionRuntime, tier: Tier) -> frozenset[str]:
    """Namespaces of this model, its number formats and this rank, and of the tenants that are served."""
    assert runtime.facts is not None
    fields: dict[str, Any] = runtime.facts.context_fields
    if runtime.config.store_tenants == "*":
        return tier.namespaces(fields)
    tenants = ["", *filter(None, runtime.config.store_tenants.split(","))]
    return frozenset().union(*(tier.namespaces(fields | {"tenant": name}) for name in tenants))
