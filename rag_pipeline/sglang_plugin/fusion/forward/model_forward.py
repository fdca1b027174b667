"""Around ``ModelRunner.forward``: the fused pass, ordinary prefill where it fails, and what is stored after it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from chunk_cache import LoadError
from rag_pipeline.sglang_plugin.fusion.builds import persistence as disk
from rag_pipeline.sglang_plugin.fusion.builds.capture import capture_chunk
from rag_pipeline.sglang_plugin.fusion.forward.batch_view import bind_adapters, slots_of
from rag_pipeline.sglang_plugin.fusion.forward.fused_forward import FusedForward
from rag_pipeline.sglang_plugin.fusion.forward.fused_item import BatchEntry, BatchPlan
from rag_pipeline.sglang_plugin.fusion.forward.loader import Loader
from rag_pipeline.sglang_plugin.fusion.forward.ordinary import ordinary_views
from rag_pipeline.sglang_plugin.fusion.forward.plan import Piece
from rag_pipeline.sglang_plugin.fusion.forward.report import attach_report, fill_report
from rag_pipeline.sglang_plugin.fusion.forward.row_operations import row_operations
from rag_pipeline.sglang_plugin.fusion.forward.sparse_decode import (
    decode_densely,
    mark_reads,
)
from rag_pipeline.sglang_plugin.fusion.forward.write_guard import ProtectedWriteError
from rag_pipeline.sglang_plugin.fusion.memory.keeping import conclude
from rag_pipeline.sglang_plugin.fusion.memory.queries import add_tap
from rag_pipeline.sglang_plugin.fusion.request.state import state_of
from rag_pipeline.sglang_plugin.fusion.runtime.runtime import FusionRuntime, get_runtime
from rag_pipeline.sglang_plugin.fusion.runtime.support import refuse_batch

PLAN_KEY = "rag_fusion_plan"


class BatchRefusedError(Exception):
    """A request of the batch cannot stand beside fused ones; the message is the label of the reason."""


def after_init_new(
    batch: Any, cls: Any, schedule_batch: Any, model_runner: Any, *args: Any, **kwargs: Any
) -> None:
    """Run after ``ForwardBatch.init_new``: the last place where a batch's requests are visible.

    Only references are kept here; the work is done around the forward, on its stream.
    """
    mode = batch.forward_mode
    runtime = get_runtime()
    if mode.is_decode() and runtime is not None:
        mark_reads(runtime, batch, schedule_batch.reqs, model_runner.attn_backend)
        return
    if mode.is_target_verify() and runtime is not None:
        decode_densely(runtime, schedule_batch.reqs)
        return
    if not mode.is_extend_without_speculative() or batch.extend_seq_lens_cpu is None:
        return
    if mode.is_split_prefill():  # a call computes some of the layers: nothing is whole behind it
        return
    entries: list[BatchEntry] = []
    for index, req in enumerate(schedule_batch.reqs):
        state = state_of(req)
        if state is None or not state.is_pending:
            continue
        start = int(batch.extend_prefix_lens_cpu[index])
        end = start + int(batch.extend_seq_lens_cpu[index])
        state.begin_piece(start)
        piece = Piece(start=start, end=end, is_last=end == len(req.full_untruncated_fill_ids))
        entries.append(BatchEntry(index=index, req=req, state=state, piece=piece))
    if entries:
        plan = BatchPlan(entries=tuple(entries), refused=refuse_batch(schedule_batch.reqs))
        batch.model_specific_states = {**(batch.model_specific_states or {}), PLAN_KEY: plan}


def around_model_forward(
    original: Callable[..., Any], runner: Any, forward_batch: Any, *args: Any, **kwargs: Any
) -> Any:
    """Wrap ``ModelRunner.forward``: other batches pass through untouched."""
    runtime = get_runtime()
    if runtime is None:
        return original(runner, forward_batch, *args, **kwargs)
    runtime.pauses.begin()
    try:
        return _forward(runtime, original, runner, forward_batch, args, kwargs)
    finally:
        runtime.pauses.end()


def _forward(
    runtime: FusionRuntime,
    original: Callable[..., Any],
    runner: Any,
    forward_batch: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    states = forward_batch.model_specific_states
    if states is None or PLAN_KEY not in states:
        runtime.build_share.note_forward(_rows(forward_batch), 0)
        if forward_batch.forward_mode.is_extend_without_speculative():
            return _timed(runtime, original, runner, forward_batch, args, kwargs)
        return original(runner, forward_batch, *args, **kwargs)
    plan: BatchPlan = states[PLAN_KEY]
    if plan.fused:
        began = time.perf_counter()
        output = _fused(runtime, original, runner, forward_batch, plan, args, kwargs)
        runtime.metrics.observe("forward_seconds", time.perf_counter() - began)
    else:
        _watch_queries(forward_batch, plan)
        output = _timed(runtime, original, runner, forward_batch, args, kwargs)
        _count_rows(runtime, forward_batch, plan)
    for entry in plan.entries:
        _conclude(runtime, runner, forward_batch, entry)
    return output


def _watch_queries(batch: Any, plan: BatchPlan) -> None:
    """Have the queries kept that score keys for a memory; the rows are those of SGLang's own batch."""
    works = {e.index: e.state.memory for e in plan.entries if e.state.memory is not None}
    if works:
        starts, counts = batch.extend_prefix_lens_cpu, batch.extend_seq_lens_cpu
        add_tap(
            batch,
            [
                (works.get(index), torch.arange(int(start), int(start) + int(count)))
                for index, (start, count) in enumerate(zip(starts, counts, strict=True))
            ],
        )


def _fused(
    runtime: FusionRuntime,
    original: Callable[..., Any],
    runner: Any,
    batch: Any,
    plan: BatchPlan,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Run the fused forward; whatever goes wrong in it, the same batch is prefilled as usual instead."""
    limit = max(entry.state.row_limit for entry in plan.fused)
    stage = "plan"
    try:
        if plan.refused:
            raise BatchRefusedError(plan.refused)
        with runtime.group.in_step():
            view, fused = FusedForward(runtime, runner, batch, plan.entries).prepare()
        stage = "pass"
        with runtime.group.in_step():
            bind_adapters(runner, view)
            with row_operations():
                output = _timed(runtime, original, runner, view, args, kwargs, fused.loader)
            if fused.fault is not None:
                raise fused.fault
            fused.loader.finish()
    except Exception as error:
        _give_up(runtime, plan.fused, stage, error)
        _forget_queries(runtime, plan)
    else:
        runtime.pass_succeeded()
        _count_rows(runtime, view, plan)
        return output
    _count_rows(runtime, batch, plan)
    # Outside the handler, so that a fault of SGLang itself is raised as itself.
    passes = ordinary_views(runner, batch, plan, limit)
    for part in passes[:-1]:
        bind_adapters(runner, part)
        original(runner, part, *args, **kwargs)
    bind_adapters(runner, passes[-1])
    return original(runner, passes[-1], *args, **kwargs)


def _timed(
    runtime: FusionRuntime,
    original: Callable[..., Any],
    runner: Any,
    batch: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    loader: Loader | None = None,
) -> Any:
    """Run a forward that extends prompts, and measure how fast rows are computed; loading and waiting do not count."""
    rows, loaded_s = _rows(batch), 0.0 if loader is None else loader.spent_s
    began = runtime.timer.begin()
    output = original(runner, batch, *args, **kwargs)
    if loader is not None:
        loaded_s = loader.spent_s - loaded_s
    runtime.timer.end(
        began, lambda seconds: runtime.rates.note_forward(rows, max(0.0, seconds - loaded_s))
    )
    return output


def _rows(batch: Any) -> int:
    return int(batch.extend_num_tokens or batch.batch_size)


def _count_rows(runtime: FusionRuntime, batch: Any, plan: BatchPlan) -> None:
    built = sum(e.piece.end - e.piece.start for e in plan.entries if e.state.internal)
    runtime.build_share.note_forward(_rows(batch), built)


def _give_up(runtime: FusionRuntime, fused: list[BatchEntry], stage: str, error: Exception) -> None:
    if isinstance(error, BatchRefusedError):
        reason = str(error)
    elif _is_load_fault(runtime, error):
        # Damage, or a tier that is too slow: no fault of fusion, however often in a row.
        reason = "load_failed"
        runtime.say_once(reason, "Chunk KV of a lower tier did not come: %s", error)
    else:
        if any(entry.state.method is not None for entry in fused):
            # A client named the method: its faults turn nothing off for others.
            runtime.say_fault(stage, error)
        else:
            runtime.pass_failed(stage, error)
        reason = "internal_error" if stage == "plan" else "fused_pass_error"
        if isinstance(error, ProtectedWriteError):
            reason = "protected_write"
    runtime.metrics.count("fallbacks", reason, len(fused))
    for entry in fused:
        # What may be published as exact stays as it is: after a fault nothing is claimed.
        entry.state.forget_spans(reason)


def _forget_queries(runtime: FusionRuntime, plan: BatchPlan) -> None:
    """Make no memory of a batch that is computed anew: what was seen of it may be of a pass that went on with zeros."""
    for entry in plan.entries:
        work = entry.state.memory
        if work is not None and work.target is not None:
            work.store_nothing()
            runtime.metrics.count("memories", "not_stored")


def _is_load_fault(runtime: FusionRuntime, error: Exception) -> bool:
    """Whether a rank failed because a record did not load; every rank is here, and all judge alike."""
    own = isinstance(error, LoadError) or isinstance(error.__cause__, LoadError)
    return any(runtime.group.gather(lambda: own))


def _conclude(runtime: FusionRuntime, runner: Any, batch: Any, entry: BatchEntry) -> None:
    """Store finished chunks, count, and let go of the leases when the prompt is complete."""
    state, piece = entry.state, entry.piece
    if state.captures:
        try:
            _store_captures(runtime, runner, batch, entry)
        except Exception as error:
            # The answer is there already: a chunk that cannot be stored is one more miss.
            runtime.say_fault("capture", error)
            runtime.metrics.count("spans", "not_stored", len(state.captures))
            state.drop_captures()
    if not state.is_fused:
        num_layers = runtime.facts.num_layers if runtime.facts else 0
        state.charge(piece.end - piece.start, num_layers)
    if piece.is_last:
        if state.memory is not None:
            table = runner.req_to_token_pool.req_to_token
            slots = slots_of(table, batch, entry.index, piece.end)
            conclude(runtime, state, runner.token_to_kv_pool, slots)
        fill_report(runtime, state)
        attach_report(entry.req, state)
        state.finish(piece.end, decodes_alone=not runtime.mixes_decoding)


def _store_captures(runtime: FusionRuntime, runner: Any, batch: Any, entry: BatchEntry) -> None:
    assert runtime.facts is not None
    state, piece = entry.state, entry.piece
    slots = slots_of(runner.req_to_token_pool.req_to_token, batch, entry.index, piece.end)
    for capture in state.captures:
        if capture.end > piece.end:
            continue
        record = capture_chunk(
            runtime.facts.layout, runner.token_to_kv_pool, runtime.facts.num_layers, slots, capture
        )
        stored = capture.build.commit(record)
        state.end_capture(capture, stored=stored)
        if stored and not runtime.epoch:  # after an update no other process can find it
            disk.keep(runtime, record)
        runtime.metrics.count("spans", "stored" if stored else "not_stored")
    runtime.metrics.show_store(runtime.store.stats())
