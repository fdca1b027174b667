"""A ``ForwardBatch`` over chosen rows: what SGLang's model runner is given instead of the whole batch.

The view is a copy with fewer rows; the scheduler's batch is never changed, so nothing needs restoring. Every length
that SGLang derives (start offsets, last rows for the logits, prefix lengths) follows the rows of the view.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rag_kernels import (
    AttentionMethod,
    MeanShiftPlan,
    MethodsOfPass,
    PositionCausalPlan,
    plan_position_causal,
    to_device,
)
from rag_pipeline.sglang_plugin.fusion.forward.layer_pass import FusedPass, Observer
from rag_pipeline.sglang_plugin.fusion.forward.loader import Loader
from rag_pipeline.sglang_plugin.fusion.forward.write_guard import WriteGuard
from rag_pipeline.sglang_plugin.fusion.runtime.model_facts import ModelFacts
from rag_pipeline.sglang_plugin.fusion.runtime.runtime import FusionRuntime
from rag_pipeline.sglang_plugin.pass_key import PASS_KEY

PADDING_SLOT = 0
"""SGLang's pools keep slot 0 out of circulation for rows whose KV nobody wants."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RequestRows:
    """Rows of one request of a batch.

    Attributes
    ----------
    index : int
        Index of the request in the batch.
    positions : Tensor
        int64 ``[R]`` on the host, rising.
    ids : Tensor
        Token ids ``[R]`` on the device.
    kv_slots : Tensor
        int64 ``[kv_len]`` on the device; slot ``j`` holds position ``j``.
    keeps_last : bool
        The last row is there for its output only; its loaded KV stays.
    method : AttentionMethod or None
        Says which keys the rows read; None for all up to their own.
    """

    index: int
    positions: Tensor
    ids: Tensor
    kv_slots: Tensor
    keeps_last: bool = False
    method: AttentionMethod | None = None

    @property
    def count(self) -> int:
        """Number of rows."""
        return int(self.positions.numel())

    @property
    def row_slots(self) -> Tensor:
        """int64 ``[R]``: where the rows' own keys and values go."""
        slots = self.kv_slots[to_device(self.positions, self.kv_slots.device)]
        if self.keeps_last:
            slots[-1] = PADDING_SLOT
        return slots


def plan_rows(
    rows: Sequence[RequestRows], facts: ModelFacts, kernel: str
) -> tuple[PositionCausalPlan, Tensor]:
    """Attention plan of a pass, and the slots of its rows in order."""
    plan = plan_position_causal(
        [r.positions for r in rows],
        [r.kv_slots for r in rows],
        num_q_heads=facts.num_q_heads,
        num_kv_heads=facts.num_kv_heads,
        head_dim=facts.head_dim,
        kernel=kernel,
    )
    return plan, torch.cat([r.row_slots for r in rows])


def make_pass(
    runtime: FusionRuntime,
    loader: Loader,
    rows: Sequence[RequestRows],
    guard: WriteGuard,
    *,
    observer: Observer | None = None,
    shifts: tuple[MeanShiftPlan, ...] = (),
) -> FusedPass:
    """One pass over these rows; a probing pass has an observer, the final one the shifts.

    Raises
    ------
    ProtectedWriteError
        It would write what the guard protects.
    """
    assert runtime.facts is not None
    plan, slots = plan_rows(rows, runtime.facts, runtime.config.attention_kernel)
    guard.check_rows([(r.index, int(r.positions[0])) for r in rows if r.count])
    if slots.device.type == "cpu":  # elsewhere the look would make the host wait: see FusedForward
        guard.check([slots, *loader.slots, *(shift.other_slots for shift in shifts)])
    methods = [r.method for r in rows]
    return FusedPass(
        row_slots=slots,
        attention=plan,
        loader=loader,
        scaling=runtime.facts.scaling,
        layout=runtime.facts.layout,
        slices=runtime.facts.slices,
        shifts=shifts,
        observer=observer,
        holds_faults=runtime.group.size > 1,
        methods=MethodsOfPass(plan, methods) if any(m is not None for m in methods) else None,
        clock=runtime.attention_clock,
    )


def slots_of(req_to_token: Tensor, batch: Any, index: int, end: int) -> Tensor:
    """Slots of a request's first ``end`` positions; int64. Which row is its own, only the device has to know."""
    row = batch.req_pool_indices[index : index + 1]
    return req_to_token[:, :end].index_select(0, row)[0].to(torch.int64)


def ordinary_rows(
    req_to_token: Tensor,
    batch: Any,
    index: int,
    start: int,
    end: int,
    fill_ids: Sequence[int] | None = None,
) -> RequestRows:
    """Rows ``[start, end)`` of a request as SGLang would lay them out.

    Parameters
    ----------
    req_to_token : Tensor
        SGLang's table of slots by request and position.
    batch : ForwardBatch
        In an extend mode; ``end`` lies in the request's piece or before it.
    index : int
        Index of the request in the batch.
    start, end : int
        Positions.
    fill_ids : sequence of int, optional
        Token ids by position; needed for positions in front of the piece, which the batch does not hold.
    """
    begin = int(batch.extend_prefix_lens_cpu[index])
    first = sum(batch.extend_seq_lens_cpu[:index]) - begin
    ids = batch.input_ids[first + max(start, begin) : first + max(end, begin)]
    if start < begin:
        assert fill_ids is not None
        early = torch.tensor(list(fill_ids[start : min(end, begin)]), dtype=ids.dtype)
        ids = torch.cat([to_device(early, ids.device), ids])
    return RequestRows(
        index=index,
        positions=torch.arange(start, end),
        ids=ids,
        kv_slots=slots_of(req_to_token, batch, index, end),
    )


def bind_adapters(runner: Any, batch: Any) -> None:
    """Lay out adapter segments for the rows that run next: SGLang did so for the rows of the whole batch."""
    if runner.lora_manager is not None:
        runner.lora_manager.prepare_lora_batch(batch)


def make_view(
    batch: Any, rows: Sequence[RequestRows], fused: FusedPass | None, *, whole_batch: bool
) -> Any:
    """Copy of a batch with only these rows.

    Parameters
    ----------
    batch : ForwardBatch
        The batch as SGLang made it, in an extend mode.
    rows : sequence of RequestRows
        In the order of the batch; every request of it when ``whole_batch``.
    fused : FusedPass or None
        Travels with the view; None for ordinary rows, which are then contiguous to the end.
    whole_batch : bool
        The view's logits are sampled from: keep all per-request fields. Otherwise the view holds only the
        given requests and must be stopped before its end.
    """
    device = batch.input_ids.device
    # The pass writes a fused row itself; a model that writes while it rotates must not be in its way.
    slots = (
        torch.cat([r.row_slots for r in rows])
        if fused is None
        else torch.full_like(fused.row_slots, PADDING_SLOT)
    )
    own = {} if fused is None else {PASS_KEY: fused}
    counts = [r.count for r in rows]
    positions = to_device(torch.cat([r.positions for r in rows]), device, batch.positions.dtype)
    lens = torch.tensor(counts, dtype=torch.int32)
    # A part of ordinary rows ends where it ends; fused rows see everything up to the end of their piece.
    ends = (int(r.positions[-1]) + 1 for r in rows)
    seq_lens = list(ends) if fused is None else [_seq_len(batch, r.index) for r in rows]
    prefixes = [length - count for length, count in zip(seq_lens, counts, strict=True)]
    changes: dict[str, Any] = {
        "input_ids": torch.cat([r.ids for r in rows]).to(batch.input_ids.dtype),
        "positions": positions,
        "out_cache_loc": slots.to(batch.out_cache_loc.dtype),
        "extend_num_tokens": sum(counts),
        "extend_seq_lens": to_device(lens, device),
        "extend_seq_lens_cpu": counts,
        # In a fused pass attention is ours; the lengths only have to add up for the backend's own metadata.
        "extend_prefix_lens": to_device(torch.tensor(prefixes, dtype=torch.int32), device),
        "extend_prefix_lens_cpu": prefixes,
        "extend_start_loc": to_device(lens.cumsum(0, dtype=torch.int32) - lens, device),
        "model_specific_states": {**(batch.model_specific_states or {}), **own},
    }
    if batch.global_num_token_non_padded_cpu is not None:
        changes["global_num_token_non_padded_cpu"] = sum(counts)
    if batch.global_num_token_non_padded is not None:
        changes["global_num_token_non_padded"] = to_device(
            torch.tensor(sum(counts), dtype=torch.int32), device
        )
    if whole_batch:
        if batch.extend_logprob_start_lens_cpu is not None:
            # The rows that input logprobs are asked for are the last ones of a request: always computed.
            changes["extend_logprob_start_lens_cpu"] = [
                max(0, count - (full - start))
                for count, full, start in zip(
                    counts,
                    batch.extend_seq_lens_cpu,
                    batch.extend_logprob_start_lens_cpu,
                    strict=True,
                )
            ]
        return dataclasses.replace(batch, **changes)
    chosen = [r.index for r in rows]
    at = to_device(torch.tensor(chosen, dtype=torch.int64), device)
    changes |= {
        "batch_size": len(rows),
        "req_pool_indices": batch.req_pool_indices[at],
        "seq_lens": to_device(torch.tensor(seq_lens), device, batch.seq_lens.dtype),
        "seq_lens_cpu": torch.tensor(seq_lens, dtype=torch.int64),
        "seq_lens_sum": sum(seq_lens),
        "orig_seq_lens": None if batch.orig_seq_lens is None else batch.orig_seq_lens[at],
        "lora_ids": None if batch.lora_ids is None else [batch.lora_ids[i] for i in chosen],
        "rids": None if batch.rids is None else [batch.rids[i] for i in chosen],
        "return_logprob": False,
        "extend_logprob_start_lens_cpu": None,
        "extend_input_logprob_token_ids_gpu": None,
        "top_logprobs_nums": None,
        "token_ids_logprobs": None,
        "mm_inputs": None,
    }
    if getattr(batch, "req_pool_indices_cpu", None) is not None:
        changes["req_pool_indices_cpu"] = batch.req_pool_indices_cpu[chosen]
    return dataclasses.replace(batch, **changes)


def _seq_len(batch: Any, index: int) -> int:
    return int(batch.extend_prefix_lens_cpu[index] + batch.extend_seq_lens_cpu[index])
