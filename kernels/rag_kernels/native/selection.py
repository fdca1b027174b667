"""Attention mass and mean shift by the library; None or False where it does not serve the tensors."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rag_kernels.native.library import (
    LARGEST_HEAD,
    TYPES,
    MassStruct,
    ShiftStruct,
    check_slots,
    library_for,
)

if TYPE_CHECKING:
    from rag_kernels.mean_shift_plan import MeanShiftPlan

_TILE = 48
"""Rows times query heads of a key/value head that keys are packed for once."""


def native_mass(
    q_RNH: Tensor, k_pool: Tensor, slots: Tensor, q_pos: Tensor, scale: float
) -> Tensor | None:
    """:func:`rag_kernels.query_attention_mass` of at least one row and key."""
    library = _library_for(q_RNH, k_pool)
    if library is None or scale <= 0.0:
        return None
    slots, q_pos = slots.to(torch.int64).contiguous(), q_pos.to(torch.int64).contiguous()
    check_slots(slots, k_pool)
    rows, q_heads, dim = q_RNH.shape
    kv_heads, kv_len = k_pool.shape[1], slots.numel()
    tiles = kv_heads * -(-rows * (q_heads // kv_heads) // _TILE)
    parts = torch.zeros(tiles, kv_len, dtype=torch.float32)
    call = MassStruct(
        q=q_RNH.data_ptr(),
        k=k_pool.data_ptr(),
        out=parts.data_ptr(),
        positions=q_pos.data_ptr(),
        slots=slots.data_ptr(),
        rows=rows,
        kv_len=kv_len,
        tile=_TILE,
        q_row=q_RNH.stride(0),
        q_head=q_RNH.stride(1),
        k_slot=k_pool.stride(0),
        k_head=k_pool.stride(1),
        q_heads=q_heads,
        kv_heads=kv_heads,
        dim=dim,
        type=TYPES[k_pool.dtype],
        threads=torch.get_num_threads(),
        scale=scale,
    )
    library.rag_mass(ctypes.byref(call))
    return parts.sum(dim=0) / (rows * q_heads)


def native_shift(
    k_pool: Tensor,
    v_pool: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    plan: MeanShiftPlan,
    k_old: Tensor | None,
    v_old: Tensor | None,
) -> bool:
    """:func:`rag_kernels.mean_shift_inplace`; whether it was done."""
    rows = [one for one in (k_new, v_new, k_old, v_old) if one is not None]
    library = _library_for(k_pool, v_pool, *rows)
    heads, dim = k_pool.shape[1:]
    if library is None or any(
        one.stride(1) != dim or one.shape[1:] != (heads, dim) for one in rows
    ):
        return False
    if v_pool.shape[1:] != (heads, dim):
        return False
    check_slots(plan.probe_slots, k_pool, v_pool)
    check_slots(plan.other_slots, k_pool, v_pool)
    most, count = int(plan.probe_rows.max()), min(one.shape[0] for one in rows)
    if most >= count:
        raise IndexError(f"the plan names row {most} of {count} rows.")
    tables = [
        one.contiguous() for one in (plan.probe_cos, plan.probe_sin, plan.other_cos, plan.other_sin)
    ]
    probe_cos, probe_sin, other_cos, other_sin = tables
    call = ShiftStruct(
        k_pool=k_pool.data_ptr(),
        v_pool=v_pool.data_ptr(),
        k_new=k_new.data_ptr(),
        v_new=v_new.data_ptr(),
        k_old=None if k_old is None else k_old.data_ptr(),
        v_old=None if v_old is None else v_old.data_ptr(),
        probe_rows=plan.probe_rows.data_ptr(),
        probe_slots=plan.probe_slots.data_ptr(),
        probe_ends=plan.probe_ends.data_ptr(),
        other_slots=plan.other_slots.data_ptr(),
        other_ends=plan.other_ends.data_ptr(),
        weights=plan.weights.data_ptr(),
        probe_cos=probe_cos.data_ptr(),
        probe_sin=probe_sin.data_ptr(),
        other_cos=other_cos.data_ptr(),
        other_sin=other_sin.data_ptr(),
        chunks=plan.probe_ends.numel(),
        k_slot=k_pool.stride(0),
        k_head=k_pool.stride(1),
        v_slot=v_pool.stride(0),
        v_head=v_pool.stride(1),
        k_new_row=k_new.stride(0),
        v_new_row=v_new.stride(0),
        k_old_row=0 if k_old is None else k_old.stride(0),
        v_old_row=0 if v_old is None else v_old.stride(0),
        heads=heads,
        dim=dim,
        rotary_dim=plan.spec.rotary_dim,
        is_neox=plan.spec.is_neox_style,
        type=TYPES[k_pool.dtype],
        threads=torch.get_num_threads(),
    )
    library.rag_mean_shift(ctypes.byref(call))
    return True


def _library_for(*tensors: Tensor) -> ctypes.CDLL | None:
    """The library, where it serves tensors of such heads."""
    return library_for(*tensors) if tensors[0].shape[-1] <= LARGEST_HEAD else None
