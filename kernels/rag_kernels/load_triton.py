"""Rotate a chunk's keys and scatter keys and values into the pool in one pass over memory.

Checked in Triton's interpreter and compiled for sm_90a; not run on a GPU here, so its speed is unmeasured.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from rag_kernels.rotary import RotarySpec, RotationTable


@triton.jit
def load_chunk_kernel(
    k_pool_ptr,
    v_pool_ptr,
    slots_ptr,
    k_src_ptr,
    v_src_ptr,
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
    cos_token,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    HALF: tl.constexpr,
    NEOX: tl.constexpr,
):
    """One token of one head; strides in elements, ``cos_token`` is 0 for one difference for all."""
    token = tl.program_id(0)
    head = tl.program_id(1)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    dims = tl.arange(0, DIM_PAD)
    inside = dims < DIM
    rotated = dims < 2 * HALF
    if NEOX:
        partner = tl.where(dims < HALF, dims + HALF, dims - HALF)
        pair = tl.where(dims < HALF, dims, dims - HALF)
        is_first = dims < HALF
    else:
        partner = dims ^ 1
        pair = dims // 2
        is_first = (dims % 2) == 0
    source = k_src_ptr + token.to(tl.int64) * k_src_token + head * k_src_head
    stored = tl.load(source + dims, mask=inside, other=0.0)
    x = stored.to(tl.float32)
    other = tl.load(source + partner, mask=rotated, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + token * cos_token + pair, mask=rotated, other=1.0)
    sin = tl.load(sin_ptr + token * cos_token + pair, mask=rotated, other=0.0)
    turned = x * cos + tl.where(is_first, -other, other) * sin
    # Adding a zero may flip the sign of a zero: what is not rotated is taken as it is.
    stays = (sin == 0.0) & (cos == 1.0)
    turned = tl.where(stays, x, turned)
    target = k_pool_ptr + slot * k_pool_slot + head * k_pool_head
    tl.store(target + dims, turned.to(k_pool_ptr.dtype.element_ty), mask=inside)
    value = tl.load(
        v_src_ptr + token.to(tl.int64) * v_src_token + head * v_src_head + dims,
        mask=inside,
        other=0.0,
    )
    tl.store(
        v_pool_ptr + slot * v_pool_slot + head * v_pool_head + dims,
        value.to(tl.float32).to(v_pool_ptr.dtype.element_ty),
        mask=inside,
    )


def load_chunk_triton(
    k_pool: Tensor,
    v_pool: Tensor,
    slots: Tensor,
    k_src: Tensor,
    v_src: Tensor,
    table: RotationTable,
    spec: RotarySpec,
) -> None:
    """See :func:`rag_kernels.load_chunk_inplace`; all tensors on one device, innermost stride 1."""
    tokens, heads, dim = k_src.shape
    if tokens == 0:
        return
    load_chunk_kernel[(tokens, heads)](
        k_pool,
        v_pool,
        slots,
        k_src,
        v_src,
        table.cos,
        table.sin,
        k_pool.stride(0),
        k_pool.stride(1),
        v_pool.stride(0),
        v_pool.stride(1),
        k_src.stride(0),
        k_src.stride(1),
        v_src.stride(0),
        v_src.stride(1),
        0 if table.cos.shape[0] == 1 else table.cos.stride(0),
        DIM=dim,
        DIM_PAD=int(triton.next_power_of_2(dim)),
        HALF=spec.rotary_dim // 2,
        NEOX=spec.is_neox_style,
        num_warps=1,
    )
