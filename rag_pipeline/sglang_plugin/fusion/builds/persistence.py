"""Chunk KV that outlives the engine: tiers below memory, read at start and on a request's miss, written in the background.

The tiers (a folder, by ``fusion.store_dir`` and ``fusion.tier``; a store that several servers share, by
``fusion.remote``) are a cache of a cache: whatever goes wrong with one is logged once, counted, and serving goes on.
Each stands behind a guard, since a disk may hang as a network does.

Reading at start fills the memory store up to its budget, the most recently used records first, and evicts nothing. Only
records that this model, on this rank, can use are read. Everything else is a thread's work:
:class:`chunk_cache.Fetcher` reads, :class:`chunk_cache.BackgroundWriter` encodes and writes. The scheduler waits for
neither.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from chunk_cache import (
    TIERS,
    ChunkKV,
    Fetcher,
    GuardedTier,
    KVContext,
    Tier,
    TierChain,
    connect_remote,
    load_store,
    shown_url,
)
from rag_pipeline.sglang_plugin.fusion.builds import erased
from rag_pipeline.sglang_plugin.fusion.builds.notice_exchange import open_exchange
from rag_pipeline.sglang_plugin.fusion.config import FusionConfig
from rag_pipeline.sglang_plugin.fusion.runtime.runtime import FusionRuntime, get_runtime

logger = logging.getLogger(__name__)

REMOTE = "remote"
"""Name of the tier that several servers share, in metrics."""
FLUSH_S = 5.0
"""Longest that an engine which stops goes on writing what waits for its tiers, seconds: SGLang kills a scheduler that
takes 15, and a full queue of 256 MiB is written in less by any disk that is worth having."""


def open_tiers(config: FusionConfig, model: str) -> dict[str, tuple[str, Callable[[], Tier]]]:
    """Tiers that the settings name, the nearest first: name, location, and what connects to it.

    Parameters
    ----------
    config : FusionConfig
        The operator's switches.
    model : str
        Folder of the tokenizer.
    """
    found: dict[str, tuple[str, Callable[[], Tier]]] = {}
    if config.store_dir:
        found[config.tier] = config.store_dir, lambda: _connect_folder(config, model)
    if config.remote:
        found[REMOTE] = (
            shown_url(config.remote),
            lambda: connect_remote(
                config.remote,
                byte_budget=config.store_bytes,
                model=model,
                codec=config.store_codec,
            ),
        )
    return found


def _connect_folder(config: FusionConfig, model: str) -> Tier:
    """Open the folder behind a guard: a disk that hangs has no time-outs of its own."""
    kind = TIERS.get(config.tier)

    def connect() -> Tier:
        tier = kind.connect(config.store_dir, byte_budget=config.store_dir_bytes, model=model)
        tier.codec = config.store_codec
        return tier

    return GuardedTier.open_folder(connect, name=config.store_dir)


def start_tiers(runtime: FusionRuntime, model: str) -> None:
    """Open the configured tiers, read what fits and start their threads; watch for erased text in any case.

    Parameters
    ----------
    runtime : FusionRuntime
        Of this process.
    model : str
        Folder of the tokenizer.
    """
    if not runtime.is_on:
        return
    # Before a tier is read: what is erased meanwhile is erased from what was read too.
    runtime.erased = erased.ErasedText(runtime, model, open_exchange(runtime.config))
    tiers: dict[str, Tier] = {}
    for name, (location, connect) in open_tiers(runtime.config, model).items():
        try:
            tier = connect()
            # The remote one is shared, and large: a request's miss looks there.
            if not tiers and name != REMOTE:
                _load(runtime, name, location, tier)
        except Exception as error:  # a tier of another distribution may raise anything
            told = error if isinstance(error, ValueError | OSError) else repr(error)
            logger.error("Chunk-KV tier %s, %s, is not used: %s", name, location, told)
            runtime.metrics.count_tier(name, "unusable")
        else:
            tiers[name] = tier
    if tiers:
        _start(runtime, tiers)
    # What lay in a folder while this server was off may have been erased by another.
    runtime.erased.begin()
    runtime.erased.watch()


def _load(runtime: FusionRuntime, name: str, location: str, tier: Tier) -> None:
    usable = _usable(runtime, tier)
    report = load_store(tier, runtime.store, namespaces=usable)
    try:
        runtime.metrics.count("turns", "restored", runtime.conversations.restore(tier, usable))
    except Exception as error:
        # A memory of another distribution may raise anything: its turns are computed anew.
        runtime.say_fault("restore", error)
    for kind, number in report.to_json().items():
        runtime.metrics.count_tier(name, kind, number)
    logger.info("Chunk-KV folder %s: %s", location, report.to_json())


def _start(runtime: FusionRuntime, tiers: dict[str, Tier]) -> None:
    assert runtime.erased is not None
    metrics = runtime.metrics

    def failed(name: str, error: Exception) -> None:
        runtime.say_once(
            f"tier {name}", "Chunk KV of the tier %s is not available: %s", name, error
        )

    def wrote(name: str, num_bytes: int, seconds: float) -> None:
        metrics.tier_moved(name, "written", num_bytes, seconds)
        _show_queues(runtime)

    def took(name: str, num_bytes: int, seconds: float) -> None:
        metrics.tier_moved(name, "read", num_bytes, seconds)
        runtime.rates.note_load(name, num_bytes, seconds)

    runtime.tiers = TierChain(
        tiers,
        count=metrics.count_tier,
        failed=failed,
        is_erased=runtime.erased.is_in_written,
        used=runtime.store.used_since,
        wrote=wrote,
        order=lambda names: runtime.rates.by_cost(names),
        group_of=runtime.conversations.group_of,
        is_pause=runtime.pauses.is_pause,
    )
    for name, tier in tiers.items():
        if tier.is_shared and not tier.has_groups:
            runtime.say_once(
                f"groups {name}",
                "The tier %s keeps no lists of conversations: after a restart their turns are computed anew, unless a "
                "folder (fusion.store_dir) has them",
                name,
            )
    if runtime.store.uses_queue:
        runtime.tiers.heed_queue(runtime.store.awaited_keys)
    if runtime.record_form is not None:
        runtime.fetcher = Fetcher(
            runtime.tiers,
            runtime.store,
            runtime.record_form,
            count=metrics.count_tier,
            took=took,
            is_worth=lambda *asked: runtime.rates.is_worth_loading(*asked),
            is_erased=runtime.erased.is_in,
            timeline=lambda: runtime.timeline,
        )


def keep(runtime: FusionRuntime, record: ChunkKV) -> None:
    """Have the record of a chunk written that was just stored."""
    prefix = runtime.prefix_of(record.key.namespace)
    if prefix is not None:
        write_record(runtime, record, prefix.context, prefix.tenant.owner)


def write_record(runtime: FusionRuntime, record: ChunkKV, context: KVContext, owner: str) -> None:
    """Have a record written to every tier; one that cannot keep up costs the copy, not the request.

    After an update of the weights nothing is written: no other process could find it.
    """
    if runtime.tiers is None or runtime.epoch:
        return
    runtime.tiers.put(record, context=context, tenant=owner)
    _show_queues(runtime)


def before_release(scheduler: Any, *args: Any, **kwargs: Any) -> None:
    """Run before ``Scheduler.release_host_resources``, the end of an orderly stop: write what waits for a tier."""
    runtime = get_runtime()
    if runtime is None:
        return
    try:
        close(runtime)
    except Exception:  # what SGLang releases behind this must be released in any case
        logger.exception("What waits for the tiers was not written")


def close(runtime: FusionRuntime) -> None:
    """Write what waits, for a bounded time, and end the tiers' threads; what is lost is counted and said."""
    if runtime.fetcher is not None:
        runtime.fetcher.close(0.0)
    if runtime.tiers is None or runtime.tiers.close(FLUSH_S):
        return
    for name, (number, _) in runtime.tiers.queues().items():
        runtime.metrics.count_tier(name, "dropped", number)
        if number:
            logger.warning(
                "The engine stops: %d records of chunk KV were not written to the tier %s in %g s",
                number,
                name,
                FLUSH_S,
            )


def _show_queues(runtime: FusionRuntime) -> None:
    for name, (records, num_bytes) in (
        {} if runtime.tiers is None else runtime.tiers.queues()
    ).items():
        runtime.metrics.tier_queue(name, records, num_bytes)


def pending(runtime: FusionRuntime) -> int:
    """Records that some tier does not have yet."""
    return runtime.tiers.pending if runtime.tiers is not None else 0


def _usable(runtime: FusionRuntime, tier: Tier) -> frozenset[str]:
    """Namespaces of this model, its number formats and this rank, and of the tenants that are served."""
    assert runtime.facts is not None
    fields: dict[str, Any] = runtime.facts.context_fields
    if runtime.config.store_tenants == "*":
        return tier.namespaces(fields)
    tenants = ["", *filter(None, runtime.config.store_tenants.split(","))]
    return frozenset().union(*(tier.namespaces(fields | {"tenant": name}) for name in tenants))
