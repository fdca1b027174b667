"""After the forward of a prompt: score its keys, keep the best of each head, store them as a record.

The published algorithm (EpiCache, https://arxiv.org/abs/2509.17396) drops the keys that lose from the cache and goes on.
Here a block is one request. What it keeps is copied out of the pool, the pool gives all of the request's slots back,
and the next block loads the record: so no slot table per layer and head is needed, and a block can be computed on any
engine that finds the record. Keys that were loaded are kept bit for bit as they lay in the record; those of the block
are moved into the frame of true positions once, in fp32.

Deviation: a request may name spans of the history whose tokens stay before others, whatever they score
(:mod:`chunk_cache.retention.owned`); without any, scores alone decide, as published.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from chunk_cache import SEEN_IDS, Build, ChunkKV, ChunkState, LoadingChunk
from chunk_cache.retention import gather_slots, keep_own, keep_top, own_columns
from rag_kernels import gather_kv, rerotate_keys
from rag_pipeline.sglang_plugin.fusion.builds.persistence import write_record
from rag_pipeline.sglang_plugin.fusion.memory.records import (
    NAME,
    OWN_FREE,
    OWN_SPANS,
    POSITIONS,
    SCORES,
    kept_shares,
    name_tensor,
)
from rag_pipeline.sglang_plugin.fusion.request.memory_work import MemoryTarget, MemoryWork
from rag_pipeline.sglang_plugin.fusion.request.state import RequestState
from rag_pipeline.sglang_plugin.fusion.runtime.model_facts import ModelFacts
from rag_pipeline.sglang_plugin.fusion.runtime.runtime import FusionRuntime


class KeptLayer(NamedTuple):
    """What a layer keeps, on the host, keys in the frame of true positions."""

    k: Tensor
    v: Tensor
    positions: Tensor
    scores: Tensor


_GOOD = {"stored", "known"}


def conclude(runtime: FusionRuntime, state: RequestState, pool: Any, slots: Tensor) -> None:
    """End a request's work with the memory: store what it was to leave, and look up what it was asked about.

    Called behind the forward of the last piece, while the leases are held; a fault costs the record, not the answer.
    """
    work, asked = state.memory, state.request.memory
    if work is None or asked is None:
        return
    try:
        keep(runtime, state, pool, slots)
        if asked.store is None and asked.spans and work.loaded:
            work.shares = kept_shares(state.spans[0].lease.record.side[POSITIONS], asked.spans)
    except Exception as error:
        runtime.say_fault("memory", error)
        runtime.metrics.count("memories", "not_stored")


def keep(runtime: FusionRuntime, state: RequestState, pool: Any, slots: Tensor) -> None:
    """Store the record that a request was to leave, on every rank or on none.

    Parameters
    ----------
    runtime : FusionRuntime
        Of this process.
    state : RequestState
        Of the request; ``state.memory`` is told what has become of it.
    pool : MHATokenToKVPool
        The paged pool; only read.
    slots : Tensor
        int64 ``[>= target.end]`` on the pool's device; slot ``j`` holds position ``j``.
    """
    work = state.memory
    target = None if work is None else work.target
    if work is None or target is None:
        return
    record: ChunkKV | None = None
    outcome: set[str] = set()

    def store() -> str:
        nonlocal record
        if not runtime.may_store(state.epoch, state.radix_len):
            return "not_stored"
        assert runtime.facts is not None
        if not _is_complete(work, target, runtime.facts.num_layers):
            return "incomplete"
        build = runtime.store.begin_build(
            target.key, target.token_ids, owner="memory", tenant=target.owner
        )
        if not isinstance(build, Build):
            if build is not ChunkState.READY:
                return "not_stored"
            with runtime.store.borrow(target.key) as there:
                if there is not None:
                    _note_shares(state, work, there)
            return "known"
        with build:
            made = _make_record(runtime.facts, state, work, target, pool, slots)
            if build.commit(made):
                record = made
        return "not_stored" if record is None else "stored"

    try:
        outcome = set(runtime.group.gather(store))
    finally:
        # A record of an id is the same wherever it was made: ranks may have it from different requests.
        is_good = bool(outcome) and outcome <= _GOOD
        if record is not None and not is_good:
            runtime.store.evict(record.key)
        work.store_nothing()
    if not is_good:
        for reason in sorted(outcome - _GOOD):
            runtime.metrics.count("memories", reason)
        return
    work.name, work.kept = target.name, int(target.token_ids.size)
    runtime.metrics.count("memories", "known" if record is None else "stored")
    if record is not None:
        _note_shares(state, work, record)
        write_record(runtime, record, target.context, target.owner)


def _note_shares(state: RequestState, work: MemoryWork, record: ChunkKV) -> None:
    asked = state.request.memory
    if asked is not None and asked.spans:
        work.shares = kept_shares(record.side[POSITIONS], asked.spans)


def _is_complete(work: MemoryWork, target: MemoryTarget, num_layers: int) -> bool:
    """Whether the queries of every row that scores were seen once in each layer."""
    rows = max(0, target.last_query - target.first_query)
    return all(
        sum(part.shape[0] for part in work.queries_of(layer)) == rows for layer in range(num_layers)
    )


def _make_record(
    facts: ModelFacts,
    state: RequestState,
    work: MemoryWork,
    target: MemoryTarget,
    pool: Any,
    slots: Tensor,
) -> ChunkKV:
    loaded = state.spans[0].lease.record if work.loaded else None
    kept = [
        _keep_layer(facts, work, target, layer, pool, slots, loaded)
        for layer in range(facts.num_layers)
    ]
    seen = torch.from_numpy(state.prompt[: target.end].astype("int32"))
    if loaded is not None:
        before = loaded.side[SEEN_IDS]
        seen = torch.cat([before, seen[target.start + work.loaded :]])
    count = int(target.token_ids.size)
    return ChunkKV(
        key=target.key,
        token_ids=target.token_ids,
        base_position=target.end - work.delta - count,
        k=torch.stack([one.k for one in kept]),
        v=torch.stack([one.v for one in kept]),
        layout=facts.layout.name,
        codec="plain" if loaded is None else loaded.codec,
        side={
            POSITIONS: torch.stack([one.positions for one in kept]),
            SCORES: torch.stack([one.scores for one in kept]),
            SEEN_IDS: seen,
            NAME: name_tensor(target.name),
            **_own_side(target),
        },
    )


def _own_side(target: MemoryTarget) -> dict[str, Tensor]:
    """What a merge needs to know of own tokens."""
    if not target.own:
        return {}
    return {
        OWN_SPANS: torch.tensor(target.own, dtype=torch.int32),
        OWN_FREE: torch.tensor([target.free], dtype=torch.int32),
    }


def _keep_layer(
    facts: ModelFacts,
    work: MemoryWork,
    target: MemoryTarget,
    layer: int,
    pool: Any,
    slots: Tensor,
    loaded: ChunkKV | LoadingChunk | None,
) -> KeptLayer:
    competing = slots[target.start : target.end]
    k_pool, v_pool = facts.layout.pool_layer(pool, layer)
    keys, values = gather_kv(k_pool, competing), gather_kv(v_pool, competing)
    num_old, next_position = work.loaded, target.end - work.delta
    new = torch.arange(next_position - (keys.shape[0] - num_old), next_position)
    positions = new.expand(keys.shape[1], -1)
    if loaded is not None:
        old = loaded.side[POSITIONS][layer].to(torch.int64)
        positions = torch.cat([old, positions], dim=1)
    positions = positions.to(keys.device)
    queries = work.queries_of(layer)
    scores = target.rule.scores(
        facts.layout.keys(keys, values),
        values,
        _scaled(facts, queries) if queries else None,
        positions,
        next_position,
    )
    count, pinned = int(target.token_ids.size), target.rule.pinned(positions, next_position)
    if target.own:
        own = own_columns(positions, target.own)
        columns = keep_own(scores, count, own, target.free, pinned)
    else:
        columns = keep_top(scores, count, pinned)
    if work.delta:
        keys[num_old:] = rerotate_keys(keys[num_old:], -work.delta, facts.rotary_of(layer))
    keys, values, host = keys.cpu(), values.cpu(), columns.cpu()
    if loaded is not None:
        k, v = loaded.layer(layer)
        keys[:num_old], values[:num_old] = k, v
    most = torch.finfo(torch.float16).max
    return KeptLayer(
        gather_slots(keys, host),
        gather_slots(values, host),
        positions.gather(1, columns).to("cpu", torch.int32),
        scores.gather(1, columns).clamp(-most, most).to("cpu", torch.float16),
    )


def _scaled(facts: ModelFacts, parts: list[Tensor]) -> Tensor:
    """Queries of all pieces, so that a rule's ``1 / sqrt(D)`` gives the model's own logits."""
    queries = torch.cat(parts)
    factor = facts.scaling * facts.head_dim**0.5
    return queries if abs(factor - 1.0) < 1e-6 else queries * factor
