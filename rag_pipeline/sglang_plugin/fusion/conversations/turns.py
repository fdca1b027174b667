"""Fused KV of a finished turn, kept for the following turns of the same conversation and for nobody else.

A request that names a conversation asks for two things: that what it computed behind its exact prefix is kept when
it ends, and that what earlier turns left so is loaded again, unmoved and never recomputed. The namespace is the
tenant, the conversation's name, and the policy with its ratio and options; the key of a segment also holds the
tokens before it and the segment that it was computed behind. So no exact request, no other tenant, conversation
or ratio ever finds one.

Why not nodes of the radix tree under an extra key: a node's slots would then be shared with the exact prefix's
nodes, or begin in the middle of a prompt, and the tree knows neither. A segment is instead a record of the chunk
store, copied out of the pool when the turn ends and into the next turn's own slots: one copy in host memory under the
store's byte budget, evicted like any chunk, and no page, lock or slot that two requests share.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch

from chunk_cache import Build, ChunkKey, hash_token_ids
from rag_pipeline.sglang_plugin.fusion.builds.capture import capture_chunk
from rag_pipeline.sglang_plugin.fusion.conversations.turn_table import Segment
from rag_pipeline.sglang_plugin.fusion.request.state import (
    Capture,
    LeasedSpan,
    RequestState,
    Tenant,
)
from rag_pipeline.sglang_plugin.fusion.runtime.runtime import FusionRuntime


def namespace_of(state: RequestState, tenant: Tenant) -> str:
    """Everything but tokens and model that a turn's KV depends on."""
    passage = state.request.passage is not False
    return repr((tenant.salt, state.request.conversation, state.policy.identity, passage))


def lease_turns(runtime: FusionRuntime, state: RequestState, tenant: Tenant) -> list[LeasedSpan]:
    """Lease what earlier turns left behind the exact prefix of a request's prompt.

    Sets ``state.turns_end`` and ``state.turn``. All tensor-parallel ranks must call it together.
    """
    chain: list[Segment] = []

    def offer() -> list[tuple[int, int, int]]:
        for segment, match in runtime.conversations.find(
            namespace_of(state, tenant), state.prompt, tenant=tenant.share
        ):
            found = runtime.store.acquire_matches(state.prompt, [match])
            if not found:
                break  # what stands behind was computed over it
            chain.append(segment)
            state.spans.append(LeasedSpan(match=match, lease=found[0][1], is_turn=True))
        return [(s.start, s.end, t.number) for s, t in zip(state.spans, chain, strict=True)]

    offers = runtime.group.gather(offer)
    leased, state.spans = state.spans, []
    agreed: list[tuple[Segment, LeasedSpan]] = []
    for segment, span, same in zip(chain, leased, zip(*offers, strict=False), strict=False):
        if len({(start, number) for start, _, number in same}) > 1:
            break
        # A rank on which the chain goes on leaves a turn where the next begins.
        end = min(end for _, end, _ in same)
        run = span.match.clipped(span.start, end)
        agreed.append((segment, dataclasses.replace(span, match=run)))
    for segment, span in zip(chain[len(agreed) :], leased[len(agreed) :], strict=True):
        # What one rank has lost all forget, or the next time that it is kept heads of two computations would mix.
        span.lease.release()
        runtime.store.evict(segment.key)
    if not agreed or agreed[-1][1].end - state.radix_len < runtime.config.min_reused_tokens:
        # The tree's exact KV reaches as far.
        for _, span in agreed:
            span.lease.release()
        agreed = []
    spans: list[LeasedSpan] = []
    for segment, span in agreed:
        state.turns_end, state.turn = span.end, segment.number
        if span.end <= state.radix_len:
            span.lease.release()
            continue
        spans.append(dataclasses.replace(span, match=span.match.clipped(state.radix_len, span.end)))
    state.spans = list(spans)
    return spans


def keep_turn(
    runtime: FusionRuntime, req: Any, state: RequestState, pool: Any, row: torch.Tensor, kv_len: int
) -> bool:
    """Store what a finished turn computed behind its exact prefix and behind the turns that it loaded.

    Parameters
    ----------
    runtime : FusionRuntime
        Of this process.
    req : Req
        Finished, its slots not yet given back.
    state : RequestState
        Of the request.
    pool : MHATokenToKVPool
        The paged pool.
    row : Tensor
        Slots of the request by position.
    kv_len : int
        Positions whose KV the request owns.

    Returns
    -------
    bool
        Whether it is stored: not without a conversation, a fused token, or after a fault or an abort.
    """
    if not state.request.conversation or state.exact_limit is None or not state.done:
        return False
    if state.report.fallback or _was_aborted(req):
        return False
    facts = runtime.facts
    assert facts is not None
    tenant = Tenant(req.extra_key, req.cache_salt)
    namespace = namespace_of(state, tenant)
    start = max(state.exact_limit, state.turns_end)
    # With overlapped scheduling the last token's KV may still be on its way: the next turn computes it.
    written = len(req.origin_input_ids) + len(req.output_ids_through_stop) - 1
    end = min(kv_len, written)
    if end - start < runtime.config.min_reused_tokens:
        return False
    ids = np.asarray(req.full_untruncated_fill_ids[:end], dtype=np.int64)
    key: ChunkKey | None = None

    def store() -> str:
        nonlocal key
        if not runtime.may_store(state.epoch, state.radix_len):
            return "not_stored"
        if not runtime.conversations.has_room(namespace, tenant=tenant.share):
            return "not_stored"
        context = facts.context(
            prefix_digest=hash_token_ids(ids[:start]), tenant=repr((namespace, state.turn))
        )
        own = ChunkKey.of(context, ids[start:])
        build = runtime.store.begin_build(own, ids[start:], owner="turn", tenant=tenant.share)
        if not isinstance(build, Build):
            return "known"  # the same turn was asked before
        with build:
            capture = Capture(start=start, end=end, base_position=start, build=build)
            slots = row[:end].to(torch.int64)
            if build.commit(capture_chunk(facts.layout, pool, facts.num_layers, slots, capture)):
                key = own
        return "stored" if key is not None else "not_stored"

    outcome: set[str] = set()
    try:
        # Kept by all or by none, so that the number of a segment means the same computation on every rank.
        outcome = set(runtime.group.gather(store))
    finally:
        if key is not None and outcome != {"stored"}:
            runtime.store.evict(key)
    if outcome == {"known"}:
        return False
    if outcome != {"stored"}:
        runtime.metrics.count("turns", "not_stored")
        return False
    assert key is not None
    runtime.conversations.add(namespace, ids, start, state.turn, key, tenant=tenant.share)
    runtime.metrics.count("turns", "stored")
    return True


def _was_aborted(req: Any) -> bool:
    if req.finished_reason is None:
        return False
    from sglang.srt.managers.schedule_batch import FINISH_ABORT

    return isinstance(req.finished_reason, FINISH_ABORT)
