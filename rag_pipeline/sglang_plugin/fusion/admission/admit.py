"""When a request is considered for a batch: find its chunks, lease them, say what may be stored and published."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from chunk_cache import Build, ChunkKey, Lease, Match, hash_token_ids
from rag_pipeline.protocol import DENSE_ATTENTION, FusionRequest, RequestError
from rag_pipeline.protocol.fields import parse_request
from rag_pipeline.sglang_plugin.fusion.admission import costs
from rag_pipeline.sglang_plugin.fusion.admission.chunk_search import find_in_spans, scan_prompt
from rag_pipeline.sglang_plugin.fusion.admission.fetching import expect
from rag_pipeline.sglang_plugin.fusion.admission.method_space import enter_space, tenant_of
from rag_pipeline.sglang_plugin.fusion.builds.variants import build_behind_passage, variant_at
from rag_pipeline.sglang_plugin.fusion.forward import plan as planning
from rag_pipeline.sglang_plugin.fusion.forward.fused_item import plan_item
from rag_pipeline.sglang_plugin.fusion.memory import leasing as memories
from rag_pipeline.sglang_plugin.fusion.request.consent import (
    may_unasked,
    refuse_asked,
)
from rag_pipeline.sglang_plugin.fusion.request.holdings import Capture, LeasedSpan
from rag_pipeline.sglang_plugin.fusion.request.internal import is_internal
from rag_pipeline.sglang_plugin.fusion.request.namespace import RadixNamespace
from rag_pipeline.sglang_plugin.fusion.request.state import ATTRIBUTE, RequestState, state_of
from rag_pipeline.sglang_plugin.fusion.runtime.attention_methods import method_for_weights
from rag_pipeline.sglang_plugin.fusion.runtime.runtime import (
    FusionRuntime,
    KnownPrefix,
    TokenArray,
    get_runtime,
)
from rag_pipeline.sglang_plugin.fusion.runtime.support import refuse_request


def after_req_init(result: Any, req: Any, *args: Any, **kwargs: Any) -> None:
    """Run after ``Req.__init__``: hang fusion's state on the requests that may use it."""
    runtime = get_runtime()
    if runtime is None:
        return
    try:
        prompt_len = len(req.origin_input_ids)
        request = parse_request(req.kv_hints, req.sampling_params.custom_params, prompt_len)
        explicit = searches = request is not None and request.mode != "off"
        if request is None:
            # With several ranks the store of one must not decide: a look-up is a vote.
            stored = runtime.group.size > 1 or runtime.store.stats().chunks_now
            allowed = may_unasked(runtime.config, req)
            searches = bool(stored) and allowed.matching
            if not (runtime.is_on and (searches or allowed.attention)):
                return
            request = FusionRequest()
        request = _with_attention(runtime, req, request)
        if request.mode == "build" and request.passage:
            request = build_behind_passage(runtime, req, request)
        policy = request.make_policy(runtime.config.policy)
        state = RequestState(
            request,
            policy,
            req.origin_input_ids,
            explicit=explicit,
            internal=is_internal(req),
            searches=searches,
        )
        setattr(req, ATTRIBUTE, state)
        enter_space(runtime, req, state)
        expect(runtime, req, state)
    except RequestError as error:
        # The tokenizer process refuses these; one that still comes (another front end) is served as usual.
        runtime.metrics.count("fallbacks", "malformed")
        runtime.say_once("malformed", "Fusion fields of a request are ignored: %s", error)
    except Exception as error:
        # A policy or a method of another distribution may raise anything.
        runtime.metrics.count("fallbacks", "malformed")
        runtime.say_fault("request", error)


def _with_attention(runtime: FusionRuntime, req: Any, request: FusionRequest) -> FusionRequest:
    """Name the engine's default method where the request names none; what is built, or has a memory, is dense."""
    default = runtime.config.attention if request.mode == "fuse" else DENSE_ATTENTION
    if is_internal(req) or not default or request.memory is not None:
        default = DENSE_ATTENTION
    return dataclasses.replace(request, attention=request.attention or default)


def admit(runtime: FusionRuntime, req: Any, state: RequestState) -> None:
    """Resolve one request: what is loaded, what is stored, what may be published.

    Everything follows from the radix match of this scheduling attempt. SGLang matches a request anew at every
    attempt, and the tree may have grown since: nothing of an earlier attempt is kept.

    Parameters
    ----------
    runtime : FusionRuntime
        Of this process.
    req : Req
        Its radix match is known: ``req.prefix_len``.
    state : RequestState
        Changed in place; ``resolved`` afterwards.
    """
    state.begin_attempt(int(req.prefix_len), runtime.epoch)
    if state.request.mode == "off":
        state.give_up("off")
        return
    reason = "" if runtime.is_on or state.internal else "fusion_off"
    reason = reason or refuse_asked(state.request, req) or refuse_request(req) or ""
    if not reason and not np.array_equal(state.prompt, req.origin_input_ids):
        # SGLang cut or replaced it after it had come: an abort, or a prompt that is too long.
        reason = "prompt_changed"
    if reason:
        if state.request.spans:
            runtime.say_once(
                reason,
                "A request with chunk spans is prefilled as usual: %s",
                runtime.off_reason or reason,
            )
        state.give_up(reason)
        return
    began = time.perf_counter()
    tenant = tenant_of(req, state)
    if state.request.mode == "build":
        prefix = runtime.prefix(state.prompt, state.request.prefix_len, tenant)
        for start, end in state.request.spans:
            _begin_capture(runtime, state, prefix, start, end)
    else:
        if state.searches:
            _find_chunks(runtime, state, tenant)
        # Not of the client's prompt alone: what was generated before a retraction is prefilled, too.
        _plan_ratio(runtime, state, len(req.full_untruncated_fill_ids))
    state.resolve()
    state.attend_by(method_for_weights(runtime, state.request))
    runtime.metrics.observe("match_seconds", time.perf_counter() - began)


def _find_chunks(runtime: FusionRuntime, state: RequestState, tenant: RadixNamespace) -> None:
    """Lease what every tensor-parallel rank has; behind the vote nothing is done that can fail on one rank."""
    request = state.request
    if request.conversation:
        runtime.conversations.lease(state, tenant)
    if request.memory is not None:
        memories.lease(runtime, state, tenant)
        if not request.spans:
            return  # chunks that nobody named are not looked for behind a memory
    prefix: KnownPrefix | None = None

    def offer() -> tuple[list[tuple[Any, ...]], list[tuple[int, int]], costs.RankCost]:
        nonlocal prefix
        prefix, missing = _look_up(runtime, state, tenant)
        chunks = [span for span in state.spans if not span.is_turn]
        runs = [_run_of(span, prefix) for span in chunks]
        return runs, missing, costs.estimate(runtime, chunks, runs)

    offers = runtime.group.gather(offer)
    agreed = set.intersection(*(set(runs) for runs, _, _ in offers))
    missing = sorted({span for _, spans, _ in offers for span in spans})
    state.retain(s for s in state.spans if s.is_turn or _run_of(s, prefix) in agreed)
    state.note_looked_up(sum(not span.is_turn for span in state.spans), len(missing))
    state.note_cost(costs.agree([cost for _, _, cost in offers], agreed))
    reused = sum(span.end - span.start for span in state.spans)
    # A memory is loaded however few its slots are.
    if reused < runtime.config.min_reused_tokens and not state.loads_memory:
        state.drop()
        if request.spans and not missing:
            state.note_fallback("in_exact_prefix")
        elif request.spans:
            state.note_fallback("miss")
    if prefix is not None and missing:
        _remember_missing(runtime, state, prefix, missing)


def _plan_ratio(runtime: FusionRuntime, state: RequestState, prompt_len: int) -> None:
    """Ask the policy how much it will recompute, now that it is known what loading takes."""
    if state.cost is None or runtime.facts is None or not state.spans:
        return
    layout, _ = plan_item(
        state,
        planning.Piece(start=state.radix_len, end=prompt_len, is_last=True),
        num_layers=runtime.facts.num_layers,
        prompt_len=prompt_len,
        qkv_share=runtime.facts.qkv_share,
    )
    state.note_planned(state.policy.planned_ratio(layout))


def _look_up(
    runtime: FusionRuntime, state: RequestState, tenant: RadixNamespace
) -> tuple[KnownPrefix | None, list[tuple[int, int]]]:
    """Lease this rank's chunks onto the state; return the prefix and the spans that are worth building."""
    request, prompt = state.request, state.prompt
    passage = request.passage is not False
    if request.spans:
        prefix: KnownPrefix | None = runtime.prefix(prompt, request.prefix_len, tenant)
        assert prefix is not None
        found = find_in_spans(runtime, prompt, prefix, request.spans, passage=passage)
    else:
        prefix, found = scan_prompt(runtime, prompt, tenant, passage=passage)
    matches = found.matches
    if prefix is not None:
        # The prefix itself is never loaded from chunks: it is exact, and what chunks were computed behind.
        low = max(int(prefix.ids.size), state.radix_len, state.turns_end)
        matches = [m.clipped(low, m.prompt_end) for m in matches if m.prompt_end > low]
    state.lease(lease_matches(runtime, prompt, prefix, matches, found.behind_passage))
    behind = max(state.radix_len, state.turns_end)
    return prefix, [(start, end) for start, end in found.missing if end > behind]


def lease_matches(
    runtime: FusionRuntime,
    prompt: TokenArray,
    prefix: KnownPrefix | None,
    matches: Sequence[Match],
    behind_passage: Collection[ChunkKey] = (),
) -> list[LeasedSpan]:
    """Lease what is still there of runs of chunks that were computed behind a prefix of the prompt."""
    return [
        LeasedSpan(
            match=match,
            lease=lease,
            is_behind_passage=match.key in behind_passage,
            is_exact=prefix is not None and _is_exact(prompt, match, lease, prefix),
        )
        for match, lease in runtime.store.acquire_matches(prompt, matches)
    ]


def _is_exact(prompt: TokenArray, match: Match, lease: Lease, prefix: KnownPrefix) -> bool:
    if match.key.namespace != prefix.context.namespace:
        return False  # computed behind the passage
    record = lease.record
    if not record.is_lossless:
        return False  # approximate wherever it stands
    return planning.stands_in_place(
        prompt,
        match,
        prefix_len=int(prefix.ids.size),
        chunk_ids=record.token_ids,
        base_position=record.base_position,
    )


def _run_of(span: LeasedSpan, prefix: KnownPrefix | None) -> tuple[Any, ...]:
    """What the ranks must have in common: the run, and everything in the chunk's key but the rank's own shard.

    Heads of two chunks, or of two variants of one, must never mix, and all must be moved by the same distance. What
    is exact on one rank only (another has read it back through a lossy codec) would make them choose other rows.
    """
    record = span.lease.record
    return (
        span.start,
        span.end,
        span.match.chunk_offset,
        record.base_position,
        span.is_behind_passage,
        span.is_exact,
        0 if prefix is None else int(prefix.ids.size),
        hash_token_ids(record.token_ids),
    )


def _remember_missing(
    runtime: FusionRuntime, state: RequestState, prefix: KnownPrefix, missing: list[tuple[int, int]]
) -> None:
    """Store a chunk right behind the exact prefix from this very prefill; queue the others."""
    from rag_pipeline.sglang_plugin.fusion.builds.idle import enqueue

    wanted = state.request.passage is not False
    with_passage = runtime.behind_passage(prefix) if wanted else None
    for start, end in missing:
        is_next = start == prefix.ids.size
        is_exact = state.request.is_dense and (
            not state.spans or end <= min(span.start for span in state.spans)
        )
        if is_next and is_exact:
            _begin_capture(runtime, state, prefix, start, end)
        else:
            behind = variant_at(start, prefix, with_passage)
            enqueue(runtime, behind, state.prompt[start:end])


def _begin_capture(
    runtime: FusionRuntime, state: RequestState, prefix: KnownPrefix, start: int, end: int
) -> None:
    if not runtime.may_store(state.epoch, state.radix_len):
        return
    ids = state.prompt[start:end]
    try:
        key = ChunkKey.of(prefix.context, ids)
        build = runtime.store.begin_build(
            key, ids, owner="prefill", tenant=prefix.tenant.owner, exact=True
        )
    except Exception as error:
        # Ranks need not agree on what is stored, but on everything else of the request: one chunk is lost, no more.
        runtime.say_fault("capture", error)
        return
    if isinstance(build, Build):
        state.begin_capture(Capture(start=start, end=end, base_position=start, build=build))


def after_release(result: Any, req: Any, *args: Any, **kwargs: Any) -> None:
    """Run after ``release_kv_cache``: finished, aborted or retracted, the request holds nothing."""
    state = state_of(req)
    if state is not None:
        state.drop()
        runtime = get_runtime()
        if runtime is not None:
            runtime.metrics.show_store(runtime.store.stats())
