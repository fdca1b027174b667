"""Position-causal attention on the CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rag_kernels.plan import PositionCausalPlan


def attend_cpu(
    q_RNH: Tensor, k_pool: Tensor, v_pool: Tensor, plan: PositionCausalPlan, scale: float
) -> Tensor:
    """See :func:`rag_kernels.position_causal_attention`."""
    q = q_RNH if plan.order is None else q_RNH.index_select(0, plan.order)
    out = torch.empty_like(q)
    gqa = plan.num_q_heads != plan.num_kv_heads
    gathered: tuple[int, Tensor, Tensor] | None = None
    for index, block in enumerate(plan.blocks):
        if gathered is None or gathered[0] != block.request:
            slots = plan.slots[block.request]
            k = k_pool.index_select(0, slots).transpose(0, 1).contiguous()
            v = v_pool.index_select(0, slots).transpose(0, 1).contiguous()
            gathered = (block.request, k, v)
        _, k, v = gathered
        mask = plan.memo.get(index)
        if mask is None:
            rows = plan.sorted_positions[block.row_lo : block.row_hi]
            mask = torch.arange(block.kv_len)[None, :] <= rows[:, None]
            plan.memo[index] = mask
        qs = q[block.row_lo : block.row_hi].transpose(0, 1)[None]
        o = F.scaled_dot_product_attention(
            qs,
            k[None, :, : block.kv_len],
            v[None, :, : block.kv_len],
            attn_mask=mask,
            scale=scale,
            enable_gqa=gqa,
        )
        out[block.row_lo : block.row_hi] = o[0].transpose(0, 1)
    return out if plan.inverse is None else out.index_select(0, plan.inverse)
