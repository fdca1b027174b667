"""When a request is considered for a batch: find and lease its chunks, and charge only rows that will be computed."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from chunk_cache import Build, ChunkKey, hash_token_ids
from rag_pipeline.sglang_plugin.fusion import plan as planning
from rag_pipeline.sglang_plugin.fusion.chunk_search import (
    build_behind_passage,
    find_in_spans,
    scan_prompt,
)
from rag_pipeline.sglang_plugin.fusion.conversation import lease_turns
from rag_pipeline.sglang_plugin.fusion.internal_requests import is_internal
from rag_pipeline.sglang_plugin.fusion.request_spans import (
    FusionRequest,
    RequestError,
    parse_request,
)
from rag_pipeline.sglang_plugin.fusion.request_state import (
    ATTRIBUTE,
    Capture,
    LeasedSpan,
    RequestState,
    Tenant,
    UsageReport,
    state_of,
)
from rag_pipeline.sglang_plugin.fusion.runtime import FusionRuntime, KnownPrefix, get_runtime
from rag_pipeline.sglang_plugin.fusion.support import refuse_request

logger = logging.getLogger(__name__)


def tenant_of(req: Any) -> Tenant:
    """Namespace of a request's chunks."""
    return Tenant(req.extra_key, req.cache_salt)


def after_req_init(result: Any, req: Any, *args: Any, **kwargs: Any) -> None:
    """Run after ``Req.__init__``: hang fusion's state on the requests that may use it."""
    runtime = get_runtime()
    if runtime is None:
        return
    try:
        prompt_len = len(req.origin_input_ids)
        request = parse_request(req.kv_hints, req.sampling_params.custom_params, prompt_len)
        explicit = request is not None and request.mode != "off"
        if request is None:
            # With several ranks the store of one must not decide: a look-up is a vote.
            stored = runtime.group.size > 1 or runtime.store.stats().chunks_now
            if not (runtime.config.automatic and runtime.is_on and stored):
                return
            request = FusionRequest()
        if request.mode == "build" and request.passage:
            request = build_behind_passage(runtime, req, request)
        policy = request.make_policy(runtime.config.policy)
        state = RequestState(
            request,
            policy,
            req.origin_input_ids,
            explicit=explicit,
            internal=is_internal(req),
        )
        setattr(req, ATTRIBUTE, state)
    except RequestError as error:
        # The tokenizer process refuses these; one that still comes (another front end) is served as usual.
        runtime.metrics.count("fallbacks", "malformed")
        runtime.say_once("malformed", "Fusion fields of a request are ignored: %s", error)


def admit(runtime: FusionRuntime, req: Any, state: RequestState) -> None:
    """Resolve one request: what is loaded, what is stored, what may be published.

    Parameters
    ----------
    runtime : FusionRuntime
        Of this process.
    req : Req
        Its radix match is known: ``req.prefix_len``.
    state : RequestState
        Changed in place; ``resolved`` afterwards.
    """
    if state.resolved:
        return
    state.radix_len = int(req.prefix_len)
    state.epoch = runtime.epoch
    state.row_layers = 0.0
    state.turns_end = state.turn = 0
    state.recomputed = []
    state.report = UsageReport(prompt_tokens=int(state.prompt.size))
    if state.request.mode == "off":
        state.give_up("off")
        return
    if not runtime.is_on and not state.internal:
        _fall_back(runtime, state, "fusion_off")
        return
    reason = refuse_request(req)
    if reason is not None:
        _fall_back(runtime, state, reason)
        return
    began = time.perf_counter()
    tenant = tenant_of(req)
    if state.request.mode == "build":
        prefix = runtime.prefix(state.prompt, state.request.prefix_len, tenant)
        for start, end in state.request.spans:
            _begin_capture(runtime, state, prefix, start, end)
    else:
        _find_chunks(runtime, state, tenant)
    state.resolved = True
    if state.spans:
        state.exact_limit = state.spans[0].start
    runtime.metrics.observe("match_seconds", time.perf_counter() - began)


def _fall_back(runtime: FusionRuntime, state: RequestState, reason: str) -> None:
    runtime.metrics.count("fallbacks", reason)
    if state.request.spans:
        runtime.say_once(
            reason,
            "A request with chunk spans is prefilled as usual: %s",
            runtime.off_reason or reason,
        )
    state.give_up(reason)


def _find_chunks(runtime: FusionRuntime, state: RequestState, tenant: Tenant) -> None:
    """Lease what every tensor-parallel rank has; behind the vote nothing is done that can fail on one rank."""
    request = state.request
    turns = lease_turns(runtime, state, tenant) if request.conversation else []
    prefix: KnownPrefix | None = None

    def offer() -> tuple[list[tuple[Any, ...]], list[tuple[int, int]]]:
        nonlocal prefix
        prefix, missing = _look_up(runtime, state, tenant)
        return [_run_of(span, prefix) for span in state.spans if not span.is_turn], missing

    offers = runtime.group.gather(offer)
    agreed = set.intersection(*(set(runs) for runs, _ in offers))
    missing = sorted({span for _, spans in offers for span in spans})
    leased = []
    for span in state.spans[len(turns) :]:
        if _run_of(span, prefix) in agreed:
            leased.append(span)
        else:
            span.lease.release()
    state.spans = [*turns, *leased]
    runtime.metrics.count("spans", "hit", len(leased))
    runtime.metrics.count("spans", "miss", len(missing))
    if sum(s.end - s.start for s in state.spans) < runtime.config.min_reused_tokens:
        state.drop()
        if request.spans and not missing:
            state.report.fallback = state.report.fallback or "in_exact_prefix"
        elif request.spans:
            runtime.metrics.count("fallbacks", "miss")
            state.report.fallback = state.report.fallback or "miss"
    if prefix is not None and missing:
        _remember_missing(runtime, state, prefix, missing)


def _look_up(
    runtime: FusionRuntime, state: RequestState, tenant: Tenant
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
    state.spans += [
        LeasedSpan(match=m, lease=lease, is_behind_passage=m.key in found.behind_passage)
        for m, lease in runtime.store.acquire_matches(prompt, matches)
    ]
    behind = max(state.radix_len, state.turns_end)
    return prefix, [(start, end) for start, end in found.missing if end > behind]


def _run_of(span: LeasedSpan, prefix: KnownPrefix | None) -> tuple[Any, ...]:
    """What the ranks must have in common: the run, and everything in the chunk's key but the rank's own shard.

    Heads of two chunks, or of two variants of one, must never mix, and all must be moved by the same distance.
    """
    record = span.lease.record
    return (
        span.start,
        span.end,
        span.match.chunk_offset,
        record.base_position,
        span.is_behind_passage,
        0 if prefix is None else int(prefix.ids.size),
        hash_token_ids(record.token_ids),
    )


def _remember_missing(
    runtime: FusionRuntime, state: RequestState, prefix: KnownPrefix, missing: list[tuple[int, int]]
) -> None:
    """Store a chunk right behind the exact prefix from this very prefill; queue the others."""
    from rag_pipeline.sglang_plugin.fusion.background import enqueue

    wanted = state.request.passage is not False
    behind = (runtime.behind_passage(prefix) if wanted else None) or prefix
    for start, end in missing:
        if start == prefix.ids.size and (not state.spans or end <= state.spans[0].start):
            _begin_capture(runtime, state, prefix, start, end)
        else:
            own_place = start == prefix.ids.size
            enqueue(runtime, prefix if own_place else behind, state.prompt[start:end])


def _begin_capture(
    runtime: FusionRuntime, state: RequestState, prefix: KnownPrefix, start: int, end: int
) -> None:
    if not runtime.may_store(state.epoch, state.radix_len):
        return
    ids = state.prompt[start:end]
    try:
        key = ChunkKey.of(prefix.context, ids)
        build = runtime.store.begin_build(key, ids, owner="prefill", tenant=prefix.tenant.salt)
    except Exception as error:
        # Ranks need not agree on what is stored, but on everything else of the request: one chunk is lost, no more.
        runtime.say_fault("capture", error)
        return
    if isinstance(build, Build):
        state.captures.append(Capture(start=start, end=end, base_position=start, build=build))


def expected_savings(state: RequestState, start: int, end: int) -> int:
    """Rows of ``[start, end)`` that a batch will not compute, as far as known at admission."""
    if not state.is_pending or not state.spans:
        return 0
    turns = planning.skipped_rows([(s.start, s.end) for s in state.spans if s.is_turn], start, end)
    chunks = planning.skipped_rows(state.loads, start, end) - turns
    return turns + int(chunks * (1.0 - min(1.0, state.policy.ratio)))


def around_add_request(
    original: Callable[..., Any], adder: Any, req: Any, *args: Any, **kwargs: Any
) -> Any:
    """Wrap ``PrefillAdder.add_one_req`` and ``add_chunked_req``: budgets count computed rows.

    The budget is raised by the rows that the request will not compute, for the time of the call, and what
    an admitted piece did not use of it is taken back.
    """
    runtime, state = get_runtime(), state_of(req)
    if runtime is None or state is None:
        return original(adder, req, *args, **kwargs)
    try:
        admit(runtime, req, state)
    except Exception:
        # Anything unforeseen here must cost speed, never a request.
        logger.exception("Matching failed; request %s is prefilled as usual", req.rid)
        runtime.metrics.count("fallbacks", "internal_error")
        state.give_up("internal_error")
    promised = expected_savings(state, int(req.prefix_len), len(req.full_untruncated_fill_ids))
    if not promised:
        return original(adder, req, *args, **kwargs)
    count = len(adder.can_run_list)
    _raise_budget(adder, promised)
    result = original(adder, req, *args, **kwargs)
    admitted = len(adder.can_run_list) > count and adder.can_run_list[-1] is req
    used = expected_savings(state, int(req.prefix_len), int(req.extend_end)) if admitted else 0
    _raise_budget(adder, used - promised)
    return result


def _raise_budget(adder: Any, rows: int) -> None:
    adder.rem_input_tokens += rows
    if adder.rem_chunk_tokens is not None:
        adder.rem_chunk_tokens += rows


def after_release(result: Any, req: Any, *args: Any, **kwargs: Any) -> None:
    """Run after ``release_kv_cache``: finished, aborted or retracted, the request holds nothing."""
    state = state_of(req)
    if state is not None:
        state.drop()
