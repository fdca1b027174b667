"""Loading of spans by the library; False where it does not serve the tensors."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rag_kernels.native.library import TYPES, LoadStruct, check_slots, library_for

if TYPE_CHECKING:
    from rag_kernels.span_load import SpanLoadPlan


def native_load(
    k_pool: Tensor,
    v_pool: Tensor,
    k_srcs: Sequence[Tensor],
    v_srcs: Sequence[Tensor],
    plan: SpanLoadPlan,
) -> bool:
    """:func:`rag_kernels.load_spans_inplace` of sources that fit; whether it was done."""
    library = library_for(k_pool, *k_srcs)
    if library is None or library_for(v_pool, *v_srcs) is None:
        return False
    check_slots(plan.slots, k_pool, v_pool)
    distinct = {delta: row for row, delta in enumerate(sorted(set(plan.deltas)))}
    angles = [distinct[delta] if delta else -1 for delta in plan.deltas]
    k_load, k_spans = _load(k_pool, k_srcs, plan, angles)
    v_load, v_spans = _load(v_pool, v_srcs, plan, [-1] * len(angles))
    loads = (LoadStruct * 2)(k_load, v_load)
    library.rag_load(loads, 2, torch.get_num_threads())
    del k_spans, v_spans
    return True


def _load(
    pool: Tensor, sources: Sequence[Tensor], plan: SpanLoadPlan, angles: Sequence[int]
) -> tuple[LoadStruct, array[int]]:
    """One tensor's load, and the spans that it points to."""
    spans, first = array("q"), 0
    for source, count, row in zip(sources, plan.lengths, angles, strict=True):
        if count:
            spans.extend((source.data_ptr(), first, count, source.stride(0), source.stride(1), row))
        first += count
    load = LoadStruct(
        pool=pool.data_ptr(),
        spans=spans.buffer_info()[0],
        slots=plan.slots.data_ptr(),
        cos=plan.cos.data_ptr(),
        sin=plan.sin.data_ptr(),
        num_spans=len(spans) // 6,
        tokens=first,
        slot=pool.stride(0),
        pool_head=pool.stride(1),
        heads=pool.shape[1],
        dim=pool.shape[2],
        rotary_dim=plan.spec.rotary_dim,
        is_neox=plan.spec.is_neox_style,
        type=TYPES[pool.dtype],
    )
    return load, spans
