"""Rotate the keys of all spans and scatter keys and values into the pool in one launch and one pass over memory.

Checked in Triton's interpreter and compiled for sm_90a; not run on a GPU here, so its speed is unmeasured.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from rag_kernels.rotary_triton import pair_of, rotated
from rag_kernels.span_load import SpanLoadPlan


@triton.jit
def load_spans_kernel(
    k_pool_ptr,
    v_pool_ptr,
    slots_ptr,
    k_src_ptr,
    v_src_ptr,
    token_rows_ptr,
    cos_ptr,
    sin_ptr,
    k_pool_slot,
    k_pool_head,
    v_pool_slot,
    v_pool_head,
    k_src_token,
    k_src_head,
    v_src_token,
    v_src_head,
    table_row,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    V_DIM: tl.constexpr,
    V_DIM_PAD: tl.constexpr,
    HALF: tl.constexpr,
    NEOX: tl.constexpr,
):
    """One token of one head; strides in elements."""
    token = tl.program_id(0)
    head = tl.program_id(1)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    dims = tl.arange(0, DIM_PAD)
    inside = dims < DIM
    is_turned = dims < 2 * HALF
    partner, pair, is_first = pair_of(dims, HALF, NEOX)
    source = k_src_ptr + token.to(tl.int64) * k_src_token + head * k_src_head
    stored = tl.load(source + dims, mask=inside, other=0.0)
    x = stored.to(tl.float32)
    other = tl.load(source + partner, mask=is_turned, other=0.0).to(tl.float32)
    row = tl.load(token_rows_ptr + token).to(tl.int64) * table_row
    cos = tl.load(cos_ptr + row + pair, mask=is_turned, other=1.0)
    sin = tl.load(sin_ptr + row + pair, mask=is_turned, other=0.0)
    turned = rotated(x, other, is_first, cos, sin)
    # Adding a zero may flip the sign of a zero: what is not rotated is taken as it is.
    stays = (sin == 0.0) & (cos == 1.0)
    turned = tl.where(stays, x, turned)
    target = k_pool_ptr + slot * k_pool_slot + head * k_pool_head
    tl.store(target + dims, turned.to(k_pool_ptr.dtype.element_ty), mask=inside)
    v_dims = tl.arange(0, V_DIM_PAD)
    v_inside = v_dims < V_DIM
    value = tl.load(
        v_src_ptr + token.to(tl.int64) * v_src_token + head * v_src_head + v_dims,
        mask=v_inside,
        other=0.0,
    )
    tl.store(
        v_pool_ptr + slot * v_pool_slot + head * v_pool_head + v_dims,
        value.to(tl.float32).to(v_pool_ptr.dtype.element_ty),
        mask=v_inside,
    )


def load_spans_triton(
    k_pool: Tensor,
    v_pool: Tensor,
    k_srcs: Sequence[Tensor],
    v_srcs: Sequence[Tensor],
    plan: SpanLoadPlan,
) -> None:
    """See :func:`rag_kernels.load_spans_inplace`; the innermost stride of the pools is 1.

    The spans are brought together on the device first: one copy per span and tensor, which waits for nobody where
    the source is pinned.
    """
    tokens, (heads, dim) = sum(plan.lengths), k_pool.shape[1:]
    if tokens == 0:
        return
    k_src, v_src = _gathered(k_srcs, k_pool), _gathered(v_srcs, v_pool)
    load_spans_kernel[(tokens, heads)](
        k_pool,
        v_pool,
        plan.slots,
        k_src,
        v_src,
        plan.token_rows,
        plan.cos,
        plan.sin,
        k_pool.stride(0),
        k_pool.stride(1),
        v_pool.stride(0),
        v_pool.stride(1),
        k_src.stride(0),
        k_src.stride(1),
        v_src.stride(0),
        v_src.stride(1),
        plan.cos.stride(0),
        DIM=dim,
        DIM_PAD=int(triton.next_power_of_2(dim)),
        V_DIM=v_pool.shape[2],
        V_DIM_PAD=int(triton.next_power_of_2(v_pool.shape[2])),
        HALF=plan.spec.rotary_dim // 2,
        NEOX=plan.spec.is_neox_style,
        num_warps=1,
    )


def _gathered(sources: Sequence[Tensor], pool: Tensor) -> Tensor:
    """All sources behind each other on the pool's device, in the narrowest type that holds them all exactly."""
    if len(sources) == 1 and sources[0].device == pool.device:
        return sources[0].contiguous()
    dtype = functools.reduce(torch.promote_types, {source.dtype for source in sources})
    lengths = [int(source.shape[0]) for source in sources]
    rows = torch.empty((sum(lengths), *pool.shape[1:]), dtype=dtype, device=pool.device)
    for part, source in zip(rows.split(lengths), sources, strict=True):
        part.copy_(source, non_blocking=True)
    return rows
