"""Position-causal attention in Triton: the portable GPU path, with sliding window and logit cap.

One program computes one row block of one query head: an online softmax over the keys ``0 .. kv_len - 1`` of the
block, read through the slot list, masked by absolute position only from the block's first position on.
Checked in Triton's interpreter (fp32, fp16) and compiled for sm_90a; not run on a GPU here, so its speed is
unmeasured.

Shape suffixes: R rows, N heads, H head dimension.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rag_kernels.attention.base import AttentionCall, AttentionKernel
from rag_kernels.attention.plan import PositionCausalPlan

_KEYS_PER_STEP = 64
_FEWEST_ROWS = 16  # smallest tile of tl.dot


@triton.jit
def position_causal_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    positions_ptr,
    slots_ptr,
    row_lo_ptr,
    row_hi_ptr,
    open_len_ptr,
    kv_len_ptr,
    slot_start_ptr,
    scale,
    logit_cap,
    window,
    q_row,
    q_head,
    k_slot,
    k_head,
    v_slot,
    v_head,
    out_row,
    out_head,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    """One row block of one query head; strides in elements, the innermost stride is 1."""
    block = tl.program_id(0)
    head = tl.program_id(1)
    kv_head = head // GROUP
    row_lo = tl.load(row_lo_ptr + block)
    row_hi = tl.load(row_hi_ptr + block)
    open_len = tl.load(open_len_ptr + block)
    kv_len = tl.load(kv_len_ptr + block)
    slot_start = tl.load(slot_start_ptr + block)

    rows = row_lo + tl.arange(0, ROWS)
    is_row = rows < row_hi
    dims = tl.arange(0, DIM_PAD)
    is_dim = dims < DIM
    position = tl.load(positions_ptr + rows, mask=is_row, other=-1)
    q = tl.load(
        q_ptr + rows[:, None].to(tl.int64) * q_row + head * q_head + dims[None, :],
        mask=is_row[:, None] & is_dim[None, :],
        other=0.0,
    )
    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIM_PAD], tl.float32)
    first = 0
    if HAS_WINDOW:
        first = tl.maximum(open_len - window, 0) // KEYS * KEYS
    for start in range(first, kv_len, KEYS):
        keys = start + tl.arange(0, KEYS)
        is_key = keys < kv_len
        slot = tl.load(slots_ptr + slot_start + keys, mask=is_key, other=0)
        k = tl.load(
            k_ptr + slot[None, :] * k_slot + kv_head * k_head + dims[:, None],
            mask=is_dim[:, None] & is_key[None, :],
            other=0.0,
        )
        logits = tl.dot(q, k, input_precision="ieee") * scale
        if HAS_CAP:
            # tanh through exp: 1 - 2 / (exp(2x) + 1) is right at both ends.
            logits = logit_cap * (1.0 - 2.0 / (tl.exp(2.0 * logits / logit_cap) + 1.0))
        seen = is_key[None, :] & (keys[None, :] <= position[:, None])
        if HAS_WINDOW:
            seen = seen & (keys[None, :] > position[:, None] - window)
        logits = tl.where(seen, logits, float("-inf"))
        new_best = tl.maximum(best, tl.max(logits, 1))
        # A row that has seen nothing yet (padding, or before its window) keeps exponents of 0.
        base = tl.where(new_best == float("-inf"), 0.0, new_best)
        weights = tl.exp(logits - base[:, None])
        fade = tl.exp(best - base)
        total = total * fade + tl.sum(weights, 1)
        v = tl.load(
            v_ptr + slot[:, None] * v_slot + kv_head * v_head + dims[None, :],
            mask=is_key[:, None] & is_dim[None, :],
            other=0.0,
        )
        acc = acc * fade[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        best = new_best
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(
        out_ptr + rows[:, None].to(tl.int64) * out_row + head * out_head + dims[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=is_row[:, None] & is_dim[None, :],
    )


def block_tensors(plan: PositionCausalPlan) -> dict[str, Tensor]:
    """Device tables of a plan's blocks; made once per plan.

    Returns
    -------
    dict
        ``slots`` int64, all requests one behind the other; per block int32 ``row_lo``, ``row_hi``, ``open_len``,
        ``kv_len`` and int64 ``slot_start``.
    """
    found: dict[str, Tensor] | None = plan.memo.get("block_tensors")
    if found is not None:
        return found
    starts = [0]
    for slots in plan.slots:
        starts.append(starts[-1] + slots.numel())

    def table(values: list[int], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype).to(plan.device, non_blocking=True)

    made = {
        "slots": torch.cat(plan.slots),
        "row_lo": table([b.row_lo for b in plan.blocks], torch.int32),
        "row_hi": table([b.row_hi for b in plan.blocks], torch.int32),
        "open_len": table([b.open_len for b in plan.blocks], torch.int32),
        "kv_len": table([b.kv_len for b in plan.blocks], torch.int32),
        "slot_start": table([starts[b.request] for b in plan.blocks], torch.int64),
    }
    plan.memo["block_tensors"] = made
    return made


class TritonKernel(AttentionKernel):
    """The portable GPU kernel, with sliding window and logit cap."""

    name = "triton"

    def refuse_device(self, device: torch.device) -> str | None:
        """Refuse the CPU, unless Triton interprets."""
        if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            return "runs on the CPU only with TRITON_INTERPRET=1"
        return None

    def is_default_on(self, device: torch.device) -> bool:
        """Be chosen on CUDA only: nothing else was compiled for."""
        return str(device.type) == "cuda"

    def attend(self, call: AttentionCall) -> Tensor:
        """Compute the call."""
        return _attend(call)


def _attend(call: AttentionCall) -> Tensor:
    plan, k_pool, v_pool = call.plan, call.k_pool, call.v_pool
    tables = block_tensors(plan)
    q = call.sorted_q
    if q.stride(-1) != 1:
        q = q.contiguous()
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    most = max(b.row_hi - b.row_lo for b in plan.blocks)
    rows = max(_FEWEST_ROWS, int(triton.next_power_of_2(most)))
    options: dict[str, Any] = {"num_warps": 8 if rows >= 128 else 4, "num_stages": 2}
    position_causal_kernel[(len(plan.blocks), plan.num_q_heads)](
        q,
        k_pool,
        v_pool,
        out,
        plan.sorted_positions,
        tables["slots"],
        tables["row_lo"],
        tables["row_hi"],
        tables["open_len"],
        tables["kv_len"],
        tables["slot_start"],
        call.scale,
        call.logit_cap or 1.0,
        call.sliding_window or 0,
        q.stride(0),
        q.stride(1),
        k_pool.stride(0),
        k_pool.stride(1),
        v_pool.stride(0),
        v_pool.stride(1),
        out.stride(0),
        out.stride(1),
        GROUP=plan.num_q_heads // plan.num_kv_heads,
        DIM=plan.head_dim,
        DIM_PAD=max(16, int(triton.next_power_of_2(plan.head_dim))),
        ROWS=rows,
        KEYS=_KEYS_PER_STEP,
        HAS_CAP=bool(call.logit_cap),
        HAS_WINDOW=call.sliding_window is not None,
        **options,
    )
    return call.unsorted(out)
