"""Mean shift of many chunks in two launches: the shift of each chunk, then the rows that stay cached.

Checked in Triton's interpreter and compiled for sm_90a; not run on a GPU here, so its speed is unmeasured.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from rag_kernels.rotary_triton import pair_of, rotated

if TYPE_CHECKING:
    from rag_kernels.mean_shift_plan import MeanShiftPlan

_TOKENS = 16


@triton.jit
def chunk_shift_kernel(
    k_old_ptr,
    v_old_ptr,
    k_new_ptr,
    v_new_ptr,
    rows_ptr,
    old_rows_ptr,
    bounds_ptr,
    weights_ptr,
    cos_ptr,
    sin_ptr,
    shift_ptr,
    k_old_row,
    k_old_head,
    v_old_row,
    v_old_head,
    k_new_row,
    k_new_head,
    v_new_row,
    v_new_head,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    HALF: tl.constexpr,
    NEOX: tl.constexpr,
    PROBES: tl.constexpr,
):
    """Weighted sum of one chunk's probes for one head; ``shift_ptr`` is fp32 ``[chunks, heads, 2, DIM]``."""
    chunk = tl.program_id(0)
    head = tl.program_id(1)
    low = tl.load(bounds_ptr + chunk)
    high = tl.load(bounds_ptr + chunk + 1)
    dims = tl.arange(0, DIM_PAD)
    is_dim = dims < DIM
    is_turned = dims < 2 * HALF
    partner, pair, is_first = pair_of(dims, HALF, NEOX)
    k_sum = tl.zeros([DIM_PAD], tl.float32)
    v_sum = tl.zeros([DIM_PAD], tl.float32)
    for start in range(low, high, PROBES):
        probe = start + tl.arange(0, PROBES)
        is_probe = probe < high
        row = tl.load(rows_ptr + probe, mask=is_probe, other=0)
        old = tl.load(old_rows_ptr + probe, mask=is_probe, other=0)
        weight = tl.load(weights_ptr + probe, mask=is_probe, other=0.0)[:, None]
        here = is_probe[:, None] & is_dim[None, :]
        turned = is_probe[:, None] & is_turned[None, :]
        k_new = k_new_ptr + (row * k_new_row + head * k_new_head)[:, None]
        k_old = k_old_ptr + (old * k_old_row + head * k_old_head)[:, None]
        moved = tl.load(k_new + dims[None, :], mask=here, other=0.0).to(tl.float32)
        moved -= tl.load(k_old + dims[None, :], mask=here, other=0.0).to(tl.float32)
        other = tl.load(k_new + partner[None, :], mask=turned, other=0.0).to(tl.float32)
        other -= tl.load(k_old + partner[None, :], mask=turned, other=0.0).to(tl.float32)
        table = (probe * HALF)[:, None] + pair[None, :]
        cos = tl.load(cos_ptr + table, mask=turned, other=1.0)
        sin = tl.load(sin_ptr + table, mask=turned, other=0.0)
        level = rotated(moved, other, is_first[None, :], cos, sin)
        k_sum += tl.sum(level * weight, 0)
        v_new = tl.load(
            v_new_ptr + (row * v_new_row + head * v_new_head)[:, None] + dims[None, :],
            mask=here,
            other=0.0,
        ).to(tl.float32)
        v_old = tl.load(
            v_old_ptr + (old * v_old_row + head * v_old_head)[:, None] + dims[None, :],
            mask=here,
            other=0.0,
        ).to(tl.float32)
        v_sum += tl.sum((v_new - v_old) * weight, 0)
    out = shift_ptr + (chunk * tl.num_programs(1) + head) * 2 * DIM
    tl.store(out + dims, k_sum, mask=is_dim)
    tl.store(out + DIM + dims, v_sum, mask=is_dim)


@triton.jit
def add_shift_kernel(
    k_pool_ptr,
    v_pool_ptr,
    slots_ptr,
    chunks_ptr,
    cos_ptr,
    sin_ptr,
    shift_ptr,
    num_tokens,
    k_slot,
    k_head,
    v_slot,
    v_head,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    HALF: tl.constexpr,
    NEOX: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Add the shift of its chunk, rotated to its place, to each of ``TOKENS`` tokens of one head."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    head = tl.program_id(1)
    is_token = token < num_tokens
    dims = tl.arange(0, DIM_PAD)
    is_turned = dims < 2 * HALF
    partner, pair, is_first = pair_of(dims, HALF, NEOX)
    slot = tl.load(slots_ptr + token, mask=is_token, other=0)
    chunk = tl.load(chunks_ptr + token, mask=is_token, other=0)
    here = is_token[:, None] & (dims < DIM)[None, :]
    turned = is_token[:, None] & is_turned[None, :]
    shift = shift_ptr + ((chunk * tl.num_programs(1) + head) * 2 * DIM)[:, None]
    k_shift = tl.load(shift + dims[None, :], mask=here, other=0.0)
    other = tl.load(shift + partner[None, :], mask=turned, other=0.0)
    table = (token * HALF)[:, None] + pair[None, :]
    cos = tl.load(cos_ptr + table, mask=turned, other=1.0)
    sin = tl.load(sin_ptr + table, mask=turned, other=0.0)
    k_at = k_pool_ptr + (slot * k_slot + head * k_head)[:, None] + dims[None, :]
    k = tl.load(k_at, mask=here, other=0.0).to(tl.float32)
    k += rotated(k_shift, other, is_first[None, :], cos, sin)
    tl.store(k_at, k.to(k_pool_ptr.dtype.element_ty), mask=here)
    v_at = v_pool_ptr + (slot * v_slot + head * v_head)[:, None] + dims[None, :]
    v = tl.load(v_at, mask=here, other=0.0).to(tl.float32)
    v += tl.load(shift + DIM + dims[None, :], mask=here, other=0.0)
    tl.store(v_at, v.to(v_pool_ptr.dtype.element_ty), mask=here)


def mean_shift_triton(
    k_pool: Tensor,
    v_pool: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    plan: MeanShiftPlan,
    k_old: Tensor | None,
    v_old: Tensor | None,
) -> None:
    """See :func:`rag_kernels.mean_shift_inplace`; innermost strides are 1, values as wide as keys."""
    heads, dim = k_pool.shape[1:]
    bounds, weights, chunks = plan.on_device()
    shift = torch.empty(
        bounds.numel() - 1, heads, 2, dim, dtype=torch.float32, device=k_pool.device
    )
    old_k = k_pool if k_old is None else k_old
    old_v = v_pool if v_old is None else v_old
    shape = {
        "DIM": dim,
        "DIM_PAD": max(16, int(triton.next_power_of_2(dim))),
        "HALF": plan.spec.rotary_dim // 2,
        "NEOX": plan.spec.is_neox_style,
        "num_warps": 4,
    }
    chunk_shift_kernel[(bounds.numel() - 1, heads)](
        old_k,
        old_v,
        k_new,
        v_new,
        plan.probe_rows,
        plan.probe_slots if k_old is None else plan.probe_rows,
        bounds,
        weights,
        plan.probe_cos,
        plan.probe_sin,
        shift,
        *(stride for one in (old_k, old_v, k_new, v_new) for stride in one.stride()[:2]),
        PROBES=_TOKENS,
        **shape,
    )
    add_shift_kernel[(triton.cdiv(plan.num_shifted, _TOKENS), heads)](
        k_pool,
        v_pool,
        plan.other_slots,
        chunks,
        plan.other_cos,
        plan.other_sin,
        shift,
        plan.num_shifted,
        *k_pool.stride()[:2],
        *v_pool.stride()[:2],
        TOKENS=_TOKENS,
        **shape,
    )
