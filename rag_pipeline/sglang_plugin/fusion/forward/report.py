"""What happened to a prompt's tokens, from the scheduler to the response's ``meta_info``.

The report rides on SGLang's ``customized_info``, which both the streaming and the plain path carry. It is marked as a
request-level value, so that it is sent once, and requests without one get no field at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from rag_pipeline.protocol import FUSION_KEY
from rag_pipeline.sglang_plugin.fusion.request.memory_work import MemoryWork
from rag_pipeline.sglang_plugin.fusion.request.state import RequestState
from rag_pipeline.sglang_plugin.fusion.runtime.runtime import FusionRuntime
from rag_pipeline.types import Truncated

LISTENERS: list[Callable[[Mapping[str, Any]], None]] = []
"""Told each ``meta_info`` with a report, in the tokenizer process: for who gave SGLang a request and reads no answer."""


def fill_report(runtime: FusionRuntime, state: RequestState) -> None:
    """Complete a report when the last piece of a prompt was computed, and count it.

    A prompt that came back after a retraction is counted again: its work was done again.
    """
    report, facts = state.report, runtime.facts
    loaded = sum(end - start for start, end in state.loads)
    last = report.prompt_tokens - 1
    # The last token is always computed: where it lay in a span, and no policy chose it, it was loaded for nothing.
    is_loaded = any(start <= last < end for start, end in state.loads)
    forced = int(is_loaded and last not in state.recomputed)
    report.exact_prefix_tokens = min(state.radix_len, report.prompt_tokens)
    report.recomputed_tokens = min(report.recomputed_tokens, loaded)
    report.reused_tokens = max(0, loaded - report.recomputed_tokens - forced)
    report.recomputed_tokens = loaded - report.reused_tokens
    report.fresh_tokens = report.prompt_tokens - report.exact_prefix_tokens - loaded
    # The slots of a memory stand for turns that are gone: they have figures of their own.
    turns = [s for s in state.spans if s.is_turn and state.request.memory is None]
    report.conversation_tokens = min(sum(s.end - s.start for s in turns), report.reused_tokens)
    moved = sum(span.end - span.start for span in turns if span.delta)
    report.moved_tokens = min(moved, report.conversation_tokens)
    if state.request.truncated[0]:
        report.truncated = Truncated(*state.request.truncated).to_json()
    if state.request.memory is not None:
        report.memory = _memory(state)
        runtime.metrics.count("memories", "missed", report.memory["missed"])
        runtime.metrics.count("memories", "slots_loaded", report.memory["loaded"])
    if loaded:
        report.policy = state.policy.name
        report.ratio = round(state.planned_ratio, 6)
        runtime.metrics.observe_ratio(state.planned_ratio)
        report.runs = prompt_runs(state)
    if state.method is not None or (state.space and state.radix_len):
        report.attention = state.request.attention
    behind = report.prompt_tokens - report.exact_prefix_tokens
    whole = behind * (facts.num_layers if facts else 1)
    report.computed_fraction = round(state.row_layers / whole, 6) if whole and loaded else 1.0
    runtime.metrics.count(
        "requests", "fused" if loaded else "built" if report.built_chunks else "plain"
    )
    runtime.metrics.count("tokens", "exact_prefix", report.exact_prefix_tokens)
    runtime.metrics.count("tokens", "reused", report.reused_tokens)
    runtime.metrics.count("tokens", "recomputed", report.recomputed_tokens)
    runtime.metrics.count("tokens", "fresh", report.fresh_tokens)
    runtime.metrics.count("turns", "tokens_loaded", report.conversation_tokens)


def _memory(state: RequestState) -> dict[str, Any]:
    asked, work = state.request.memory, state.memory
    assert asked is not None
    if work is None:  # it was given up before anything was looked for
        work = MemoryWork(is_missed=bool(asked.load))
    told: dict[str, Any] = {
        "loaded": work.loaded,
        "missed": int(work.is_missed),
        "stored": bool(work.name),
    }
    if work.name:
        told |= {"id": work.name, "kept": work.kept}
    if asked.spans:
        told["kept_share"] = work.shares
    return told


def prompt_runs(state: RequestState) -> list[list[int]]:
    """Paint the prompt token by token; empty where the picture would not agree with the counts."""
    report = state.report
    kinds = np.full(report.prompt_tokens, 3, dtype=np.int8)
    kinds[: report.exact_prefix_tokens] = 0
    for start, end in state.loads:
        kinds[start:end] = 1
    computed = np.asarray([*state.recomputed, report.prompt_tokens - 1], dtype=np.int64)
    kinds[computed[kinds[computed] == 1]] = 2
    counts = np.bincount(kinds, minlength=4).tolist()
    expected = (
        report.exact_prefix_tokens,
        report.reused_tokens,
        report.recomputed_tokens,
        report.fresh_tokens,
    )
    if tuple(counts) != expected:
        return []
    edges = np.flatnonzero(np.diff(kinds)) + 1
    starts = np.concatenate([[0], edges])
    lengths = np.diff(np.concatenate([starts, [kinds.size]]))
    return [[int(kinds[at]), int(length)] for at, length in zip(starts, lengths, strict=True)]


def attach_report(req: Any, state: RequestState) -> None:
    """Put the report where SGLang's output path picks it up."""
    if req.customized_info is None:
        req.customized_info = {}
    req.customized_info[FUSION_KEY] = [state.report.to_json()]


def around_request_level_key(original: Callable[..., bool], streamer: Any, key: str) -> bool:
    """Wrap ``SchedulerOutputStreamer.is_request_level_customized_info_key``: ours is sent once."""
    return key == FUSION_KEY or original(streamer, key)


def around_update_meta_info(
    original: Callable[..., None],
    manager: Any,
    meta_info: dict[str, Any],
    state: Any,
    customized_info: dict[str, Any],
    index: int,
    finish_reason: Any,
) -> None:
    """Wrap ``TokenizerManager.update_request_meta_info``: a dict, or nothing, instead of a list."""
    values = customized_info.get(FUSION_KEY)
    rest = customized_info
    if values is not None:
        rest = {key: value for key, value in customized_info.items() if key != FUSION_KEY}
        if values[index]:
            # With streaming only one message brings it, and SGLang may skip that one; it then fills in
            # what is kept here, as a list of one.
            state.customized_info_accumulated[FUSION_KEY] = [values[index][0]]
            state.customized_info_reported_keys.add(FUSION_KEY)
    original(manager, meta_info, state, rest, index, finish_reason)
    report = state.customized_info_accumulated.get(FUSION_KEY)
    if report:
        meta_info[FUSION_KEY] = report[0]
        for listen in LISTENERS:
            listen(meta_info)


def after_coalesce(
    result: dict[str, Any], manager: Any, out_list: list[dict[str, Any]], *args: Any, **kwargs: Any
) -> None:
    """Run after ``TokenizerManager._coalesce_streaming_chunks``, which joins customised values as lists."""
    reports = [m[FUSION_KEY] for out in out_list if FUSION_KEY in (m := out.get("meta_info", {}))]
    if reports:
        first = reports[0]
        result["meta_info"][FUSION_KEY] = first[0] if isinstance(first, list) else first
