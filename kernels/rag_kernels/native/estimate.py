"""The choice of SALE by the library; False where it does not serve the tensors."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rag_kernels.native.library import (
    TYPES,
    SaleGroupStruct,
    SaleStruct,
    check_slots,
    load_library,
)

if TYPE_CHECKING:
    from rag_kernels.attention.base import AttentionCall
    from rag_kernels.sparse.sale.layout import RequestLayout


_LARGEST_HEAD = 256
"""Most dimensions of a head whose keys it rounds to 4 bits."""


def native_choice(
    layout: RequestLayout,
    call: AttentionCall,
    slots: Tensor,
    mean: Tensor,
    tau: Tensor,
    allowed: Tensor,
    *,
    key_block: int,
    dense_tau: float,
    largest_tau: float,
) -> bool:
    """Fill the candidates of a request's mask.

    Parameters
    ----------
    layout : RequestLayout
        Rows of the request.
    call : AttentionCall
        Queries, keys and softmax scale.
    slots : Tensor
        int64 ``[keys]``: slot of each position.
    mean : Tensor
        fp32 ``[N, D]``: what is taken from the keys.
    tau : Tensor
        fp32 ``[H]``: heads below ``dense_tau`` keep everything, those with ``inf`` the first block only.
    allowed : Tensor
        bool ``[H, Q, K]``; row ``i`` stands for query block ``layout.first_block + i``. Entries that are no candidates
        are left as they are.
    key_block : int
        Keys of a block.
    dense_tau, largest_tau : float
        Smallest threshold that is looked at, and what larger ones count as.

    Returns
    -------
    bool
        Whether it was done. Results do not depend on the number of threads.
    """
    q, pool, plan = call.q_RNH, call.k_pool, call.plan
    if q.device.type != "cpu" or not {q.dtype, pool.dtype} <= set(TYPES):
        return False
    if (
        plan.head_dim > _LARGEST_HEAD
        or q.stride(2) != 1
        or pool.stride(2) != 1
        or call.scale <= 0.0
    ):
        return False
    library = load_library()
    if library is None:
        return False
    slots = slots[: layout.num_keys].to(torch.int64).contiguous()
    check_slots(slots, pool)
    if q.shape != (plan.num_rows, plan.num_q_heads, plan.head_dim):
        raise IndexError(
            f"queries of shape {list(q.shape)} for a plan of {plan.num_rows} rows, {plan.num_q_heads} heads of "
            f"{plan.head_dim}."
        )
    groups = (SaleGroupStruct * len(layout.groups))()
    first_block = first_row = 0
    for one, group in zip(groups, layout.groups, strict=True):
        one.candidates, one.end = group.num_candidates, group.end
        one.blocks, one.width = group.rows.shape
        one.first_block, one.first_row = first_block, first_row
        first_block += one.blocks
        first_row += group.rows.numel()
    blocks = torch.cat([group.blocks for group in layout.groups]) - layout.first_block
    rows = torch.cat([group.rows.flatten() for group in layout.groups])
    positions = torch.cat([group.positions.flatten() for group in layout.groups])
    mean, tau = mean.contiguous(), tau.contiguous()
    struct = SaleStruct(
        q=q.data_ptr(),
        k=pool.data_ptr(),
        order=None if plan.order is None else plan.order.data_ptr(),
        slots=slots.data_ptr(),
        mean=mean.data_ptr(),
        tau=tau.data_ptr(),
        groups=ctypes.addressof(groups),
        blocks=blocks.data_ptr(),
        rows=rows.data_ptr(),
        positions=positions.data_ptr(),
        allowed=allowed.data_ptr(),
        num_groups=len(groups),
        mask_rows=allowed.shape[1],
        mask_cols=allowed.shape[2],
        key_block=key_block,
        q_row=q.stride(0),
        q_head=q.stride(1),
        k_slot=pool.stride(0),
        k_head=pool.stride(1),
        q_heads=plan.num_q_heads,
        kv_heads=plan.num_kv_heads,
        dim=plan.head_dim,
        q_type=TYPES[q.dtype],
        kv_type=TYPES[pool.dtype],
        threads=torch.get_num_threads(),
        scale=call.scale,
        dense_tau=dense_tau,
        largest_tau=largest_tau,
    )
    return bool(library.rag_sale(ctypes.byref(struct)) == 0)
