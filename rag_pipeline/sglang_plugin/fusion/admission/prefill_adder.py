"""Around SGLang's ``PrefillAdder``: budgets count computed rows, and nothing is fused beside requests that forbid it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from chunk_cache.policies import ScoredPolicy
from rag_pipeline.sglang_plugin.fusion.admission.admit import admit
from rag_pipeline.sglang_plugin.fusion.admission.fetching import must_wait
from rag_pipeline.sglang_plugin.fusion.admission.method_space import enter_space
from rag_pipeline.sglang_plugin.fusion.forward import plan as planning
from rag_pipeline.sglang_plugin.fusion.forward.fused_item import plan_item
from rag_pipeline.sglang_plugin.fusion.request.state import RequestState, state_of
from rag_pipeline.sglang_plugin.fusion.runtime.runtime import FusionRuntime, get_runtime
from rag_pipeline.sglang_plugin.fusion.runtime.support import refuse_batch

_SILENT = ("off", "in_exact_prefix")
"""Reasons of ordinary prefill that are no fallback: it is what was asked for, or all that is needed."""


def _count_admitted(runtime: FusionRuntime, state: RequestState) -> None:
    """Count what was found for a request that goes into a batch; attempts that were refused do not count."""
    hits, misses = state.looked_up
    runtime.metrics.count("spans", "hit", hits)
    runtime.metrics.count("spans", "miss", misses)
    if state.explicit:
        runtime.store.note_absent(misses)
    if state.method is not None and not state.space:
        runtime.metrics.count("prefixes", _why_not_shared(state))
    if state.report.fallback and state.report.fallback not in _SILENT:
        runtime.metrics.count("fallbacks", state.report.fallback)


def _why_not_shared(state: RequestState) -> str:
    """Why nothing that an attention method computes for a prompt is found by later ones."""
    if state.request.spans or state.spans:
        return "chunks"
    if state.request.conversation:
        return "conversation"
    assert state.method is not None
    return "other" if state.method.prefix_unit else "by_method"


def expected_savings(state: RequestState, start: int, end: int) -> int:
    """Rows of ``[start, end)`` that a batch will not compute, as far as known at admission."""
    if not state.is_pending or not state.spans:
        return 0
    last = end - 1  # computed in any case
    turns = planning.skipped_rows([(s.start, s.end) for s in state.spans if s.is_turn], start, last)
    chunks = planning.skipped_rows(state.loads, start, last) - turns
    return turns + int(chunks * (1.0 - state.planned_ratio))


def _is_dearer(runtime: FusionRuntime, adder: Any, req: Any, state: RequestState) -> bool:
    """Whether a prompt that is cut would cost more rows than its plain prefill.

    A policy with a signal chooses in the last piece, and what earlier pieces computed behind the first row that it
    may choose is computed twice. At ratio 1 nothing is saved however the prompt is cut, and fusion was asked for.
    """
    start, total = int(req.prefix_len), len(req.full_untruncated_fill_ids)
    rows = adder.rem_chunk_tokens
    once = total - start - expected_savings(state, start, total)
    policy = state.policy
    if rows is None or once <= rows or not isinstance(policy, ScoredPolicy):
        return False
    if state.planned_ratio >= 1.0:
        return False
    assert runtime.facts is not None
    whole = planning.Piece(start=start, end=total, is_last=True)
    layout, _ = plan_item(
        state,
        whole,
        num_layers=runtime.facts.num_layers,
        prompt_len=total,
        qkv_share=runtime.facts.qkv_share,
    )
    reused = layout.reused_positions()
    if not reused.numel() or not policy.num_selected(layout)[-1]:
        return False
    last = dataclasses.replace(whole, start=_last_piece(state, start, total, rows))
    again = planning.outdated_positions(state.loads, int(reused[0]), last)
    return once + int(again.numel()) > total - start


def around_add_one_req(
    original: Callable[..., Any], adder: Any, req: Any, *args: Any, **kwargs: Any
) -> Any:
    """Wrap ``PrefillAdder.add_one_req``: resolve the request for this attempt; refused, it holds nothing again."""
    runtime, state = get_runtime(), state_of(req)
    if runtime is None:
        return original(adder, req, *args, **kwargs)
    if state is None:
        return _add_plain(runtime, original, adder, req, args, kwargs)
    try:
        # In another namespace than it was matched in, it is matched again.
        if enter_space(runtime, req, state) or must_wait(runtime, adder, req, state):
            from sglang.srt.managers.schedule_policy import AddReqResult

            return AddReqResult.CONTINUE  # those behind it may go first
        admit(runtime, req, state)
        reason = refuse_batch(_mates(runtime, adder)) if state.is_fused else ""
        if reason and state.loads_memory and refuse_batch(adder.can_run_list):
            from sglang.srt.managers.schedule_policy import AddReqResult

            # The next batch is soon, and no prefill gives what a memory holds.
            state.drop()
            return AddReqResult.OTHER
        if reason:
            state.give_up(reason)
        elif state.spans and not state.loads_memory and _is_dearer(runtime, adder, req, state):
            method = state.method
            state.give_up("no_savings")
            state.attend_by(method)  # loading does not pay; reading fewer keys still does
    except Exception as error:
        # Anything unforeseen here must cost speed, never a request.
        runtime.say_fault("match", error)
        state.give_up("internal_error")
    add = _add_fused if state.is_fused else _add_plain
    result = add(runtime, original, adder, req, args, kwargs)
    if _is_admitted(adder, req):
        _count_admitted(runtime, state)
    else:
        state.drop()
    return result


def around_add_chunked_req(
    original: Callable[..., Any], adder: Any, req: Any, *args: Any, **kwargs: Any
) -> Any:
    """Wrap ``PrefillAdder.add_chunked_req``: the next piece of a prompt that was resolved with its first one."""
    runtime, state = get_runtime(), state_of(req)
    if runtime is None or state is None or not state.is_fused:
        return original(adder, req, *args, **kwargs)
    return _add_fused(runtime, original, adder, req, args, kwargs)


def _is_admitted(adder: Any, req: Any) -> bool:
    return bool(adder.can_run_list) and adder.can_run_list[-1] is req


def _add_fused(
    runtime: FusionRuntime,
    original: Callable[..., Any],
    adder: Any,
    req: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Add a request with budgets that count computed rows.

    The budget is raised by the rows that the request will not compute, for the time of the call, and what
    an admitted piece did not use of it is taken back. It is raised for as far as the piece can go, no further:
    rows that are saved behind its end pay for none in front of it.
    """
    state = state_of(req)
    assert state is not None
    start, total = int(req.prefix_len), len(req.full_untruncated_fill_ids)
    rows = adder.rem_chunk_tokens
    state.limit_rows(_row_limit(adder, total - start))
    promised = expected_savings(state, start, total)
    if rows is not None and total - start - promised > rows:
        promised = _piece_end(state, start, total, rows) - start - rows
    _raise_budget(adder, promised)
    result = original(adder, req, *args, **kwargs)
    admitted = _is_admitted(adder, req)
    used = expected_savings(state, start, int(req.extend_end)) if admitted else 0
    _raise_budget(adder, used - promised)
    if rows is not None and admitted and int(req.extend_end) < total:
        # A batch holds one prompt that is cut, SGLang insists: nobody takes what this piece may have left of it.
        adder.rem_chunk_tokens = min(adder.rem_chunk_tokens, 0)
    return result


def _piece_end(state: RequestState, start: int, total: int, rows: int) -> int:
    """Where a piece of a prompt has to end, so that it computes at most so many rows."""
    end = planning.reach(
        rows, start, total, lambda to: to - start - expected_savings(state, start, to)
    )
    if not state.spans:
        return end
    question = state.spans[-1].end
    if isinstance(state.policy, ScoredPolicy) and start + rows <= question < end:
        # The question's rows choose, in the last piece: they stay together where that costs nothing.
        return question
    return end


def _last_piece(state: RequestState, start: int, total: int, rows: int) -> int:
    """Where the last piece begins, if each computes at most so many rows."""
    while start < (end := _piece_end(state, start, total, rows)) < total:
        start = end
    return start


def _row_limit(adder: Any, rows: int) -> int:
    """Most rows that SGLang would let the batch have, the next request with its `rows` among them."""
    spent = sum(req.extend_end - req.prefix_len - _savings_of(req) for req in adder.can_run_list)
    if adder.rem_chunk_tokens is not None:
        return int(adder.rem_chunk_tokens + spent)
    # Without a chunk limit a prompt is never cut, however long it is.
    return int(max(adder.rem_input_tokens + spent, rows))


def _savings_of(req: Any) -> int:
    state = state_of(req)
    return 0 if state is None else expected_savings(state, int(req.prefix_len), int(req.extend_end))


def _mates(runtime: FusionRuntime, adder: Any) -> list[Any]:
    """Requests that are in the next batch already."""
    running = adder.running_batch.reqs if runtime.mixes_decoding else []
    return [*adder.can_run_list, *running]


def _add_plain(
    runtime: FusionRuntime,
    original: Callable[..., Any],
    adder: Any,
    req: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Add a request that no pass of fusion's own computes; one that cannot stand beside fused ones makes them ordinary.

    They then compute all their rows, so the batch has less room, and SGLang judges by that. A prompt whose earlier
    pieces hold fused KV cannot become ordinary any more: the newcomer waits for its last piece. It waits for one that
    loads a memory, too, whose prefill would be an answer that has forgotten the conversation.
    """
    reason = refuse_batch([req])
    fused = [(r, s) for r in adder.can_run_list if (s := state_of(r)) is not None and s.is_fused]
    if not reason or not fused:
        return original(adder, req, *args, **kwargs)
    from sglang.srt.managers.schedule_policy import AddReqResult

    if any(r.prefix_len > s.radix_len or s.loads_memory for r, s in fused):
        return AddReqResult.OTHER
    saved = sum(_savings_of(r) for r, _ in fused)
    _raise_budget(adder, -saved)
    result = AddReqResult.OTHER
    if adder.budget_state() is AddReqResult.CONTINUE:
        result = original(adder, req, *args, **kwargs)
    if not _is_admitted(adder, req):
        _raise_budget(adder, saved)
        return result
    for _, state in fused:
        state.give_up(reason)
        runtime.metrics.count("fallbacks", reason)
    return result


def _raise_budget(adder: Any, rows: int) -> None:
    adder.rem_input_tokens += rows
    if adder.rem_chunk_tokens is not None:
        adder.rem_chunk_tokens += rows
