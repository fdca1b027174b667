"""Position-causal attention on CPUs with AMX: torch's fused attention over blocks of sorted rows, bf16 only.

The query heads that share a key head stand together, so that a block is one tall matrix; what its rows may not see is an
additive mask. Torch multiplies these matrices in AMX tiles, where ``cpp`` has AVX-512: with a mask a block computes up
to its last row's key for every row, and is faster all the same.

Measured (Intel Xeon with AMX, one thread of a busy machine, bf16, 360 scattered rows and 2,400 keys, CPU time of 3 in ms, here
against ``cpp``): 9 query and 3 key heads of 64 10.4 / 16.0, 14 and 2 of 64 15.2 / 26.7, 32 and 8 of 128 48.5 / 104.5, 12 and
1 of 320 (latents) 31.3 / 93.1; all 2,400 rows of the last 182 / 617. Blocks of 64 and 128 rows measured alike, 16 and 256 slower.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rag_kernels.attention.base import AttentionCall, AttentionKernel
from rag_kernels.attention.plan import PositionCausalPlan, RowBlock


class AmxKernel(AttentionKernel):
    """Blocks of sorted rows through torch's fused attention; see the module."""

    name = "amx"
    block_rows = 64
    """Measured best."""

    def refuse_device(self, device: torch.device) -> str | None:
        """Refuse everything but the CPU; without AMX it computes the same, slowly."""
        return None if device.type == "cpu" else f"cannot run on {device}"

    def is_default_on(self, device: torch.device) -> bool:
        """Take it where the CPU has tiles."""
        return device.type == "cpu" and bool(torch.cpu._is_amx_tile_supported())

    def refuse(self, call: AttentionCall) -> str | None:
        """Refuse what torch's fused attention has no tiles or no rule for."""
        if {call.q_RNH.dtype, call.k_pool.dtype, call.v_pool.dtype} != {torch.bfloat16}:
            return "computes bf16 only"
        if call.logit_cap:
            return "caps no logits"
        return super().refuse(call)

    def attend(self, call: AttentionCall) -> Tensor:
        """Compute the call."""
        plan = call.plan
        kv_heads, dim = plan.num_kv_heads, plan.head_dim
        group = plan.num_q_heads // kv_heads
        q = call.sorted_q
        out = torch.empty_like(q)
        request = -1
        keys = values = q
        for block in plan.blocks:
            if block.request != request:
                request = block.request
                slots = plan.slots[request]
                keys = call.k_pool.index_select(0, slots).transpose(0, 1)[None]
                is_one = call.v_pool is call.k_pool
                values = (
                    keys if is_one else call.v_pool.index_select(0, slots).transpose(0, 1)[None]
                )
            rows = slice(block.row_lo, block.row_hi)
            count = block.row_hi - block.row_lo
            first, mask = _mask(plan, block, group, call.sliding_window)
            tall = q[rows].reshape(count, kv_heads, group, dim).transpose(0, 1).flatten(1, 2)
            seen = scaled_dot_product_attention(
                tall[None],
                keys[:, :, first : block.kv_len],
                values[:, :, first : block.kv_len],
                attn_mask=mask,
                scale=call.scale,
            )
            out[rows] = seen[0].unflatten(1, (count, group)).transpose(0, 1).flatten(1, 2)
        return call.unsorted(out)


def _mask(
    plan: PositionCausalPlan, block: RowBlock, group: int, window: int | None
) -> tuple[int, Tensor]:
    """First key of a block, and the additive mask of its keys, ``[rows * group, keys]``; made once for all layers."""
    first = 0 if window is None else max(0, block.open_len - window)
    key = ("amx", block.row_lo, window)
    mask = plan.memo.get(key)
    if mask is None:
        positions = plan.sorted_on_host[block.row_lo : block.row_hi].long()[:, None]
        at = torch.arange(first, block.kv_len)[None, :]
        hidden = at > positions
        if window is not None:
            hidden |= at <= positions - window
        mask = torch.zeros(hidden.shape, dtype=torch.bfloat16)
        mask = mask.masked_fill_(hidden, float("-inf")).repeat_interleave(group, dim=0)
        plan.memo[key] = mask
    return first, mask
