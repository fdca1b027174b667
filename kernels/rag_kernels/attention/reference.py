"""Position-causal attention in plain torch: right on every device, with window and logit cap."""

from __future__ import annotations

import torch
from torch import Tensor

from rag_kernels.attention.base import AttentionCall, AttentionKernel
from rag_kernels.attention.mask import RequestBlocks
from rag_kernels.attention.plan import PositionCausalPlan
from rag_kernels.paged import gather_kv

_BLOCK_ELEMENTS = 16 << 20  # fp32 logits held at once: 64 MiB


class ReferenceKernel(AttentionKernel):
    """Softmax in fp32 over all keys of the request with the mask written out."""

    name = "reference"
    reads_masks = True
    reads_sinks = True

    def refuse_device(self, device: torch.device) -> str | None:
        """Run anywhere."""
        return None

    def attend(self, call: AttentionCall) -> Tensor:
        """Compute the call."""
        q_RNH, plan = call.q_RNH, call.plan
        out = torch.empty_like(q_RNH)
        positions = plan.positions.to(q_RNH.device, torch.int64)
        group = plan.num_q_heads // plan.num_kv_heads
        for request, slots in enumerate(plan.slots):
            lo, hi = plan.row_starts[request], plan.row_starts[request + 1]
            if lo == hi:
                continue
            k = (
                gather_kv(call.k_pool, slots)
                .float()
                .repeat_interleave(group, dim=1)
                .permute(1, 2, 0)
            )
            v = (
                gather_kv(call.v_pool, slots)
                .float()
                .repeat_interleave(group, dim=1)
                .transpose(0, 1)
            )
            key_at = torch.arange(slots.numel(), device=q_RNH.device)
            step = max(1, _BLOCK_ELEMENTS // (plan.num_q_heads * slots.numel()))
            for row in range(lo, hi, step):
                end = min(row + step, hi)
                p = positions[row:end, None]
                logits = torch.bmm(q_RNH[row:end].float().transpose(0, 1) * call.scale, k)
                if call.logit_cap:
                    logits = call.logit_cap * torch.tanh(logits / call.logit_cap)
                hidden = key_at[None, :] > p
                if call.sliding_window is not None:
                    hidden |= key_at[None, :] <= p - call.sliding_window
                blocks = None if call.mask is None else call.mask.requests[request]
                if blocks is not None:
                    hidden = hidden | ~_keys(blocks, positions[row:end], slots.numel(), plan)
                logits.masked_fill_(hidden, float("-inf"))
                if call.sinks is not None:
                    sink = call.sinks.float()[:, None, None].expand(-1, end - row, 1)
                    logits = torch.cat([logits, sink], dim=-1)
                weights = torch.softmax(logits, dim=-1)[..., : slots.numel()]
                out[row:end] = torch.bmm(weights, v).transpose(0, 1).to(out.dtype)
        return out


def _keys(
    blocks: RequestBlocks, positions: Tensor, num_keys: int, plan: PositionCausalPlan
) -> Tensor:
    """Keys that rows may read by the mask alone; bool ``[Hq or 1, R, num_keys]``."""
    rows = blocks.rows(positions)
    if rows.shape[0] not in (1, plan.num_q_heads):
        rows = rows.repeat_interleave(plan.num_q_heads // plan.num_kv_heads, dim=0)
    key_block = torch.arange(num_keys, device=rows.device) // blocks.key_block
    is_covered = key_block < rows.shape[2]  # keys behind the last row need no entry
    return rows[:, :, key_block.clamp(max=rows.shape[2] - 1)] & is_covered
