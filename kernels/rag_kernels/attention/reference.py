"""Position-causal attention in plain torch: right on every device, with window and logit cap."""

from __future__ import annotations

import torch
from torch import Tensor

from rag_kernels.attention.base import AttentionKernel
from rag_kernels.attention.plan import PositionCausalPlan
from rag_kernels.paged import gather_kv

_BLOCK_ELEMENTS = 16 << 20  # fp32 logits held at once: 64 MiB


class ReferenceKernel(AttentionKernel):
    """Softmax in fp32 over all keys of the request with the mask written out."""

    name = "reference"

    def refuse_device(self, device: torch.device) -> str | None:
        """Run anywhere."""
        return None

    def attend(
        self,
        q_RNH: Tensor,
        k_pool: Tensor,
        v_pool: Tensor,
        plan: PositionCausalPlan,
        scale: float,
        sliding_window: int | None,
        logit_cap: float | None,
    ) -> Tensor:
        """Compute the call."""
        out = torch.empty_like(q_RNH)
        positions = plan.positions.to(q_RNH.device, torch.int64)
        group = plan.num_q_heads // plan.num_kv_heads
        for request, slots in enumerate(plan.slots):
            lo, hi = plan.row_starts[request], plan.row_starts[request + 1]
            if lo == hi:
                continue
            k = gather_kv(k_pool, slots).float().repeat_interleave(group, dim=1).permute(1, 2, 0)
            v = gather_kv(v_pool, slots).float().repeat_interleave(group, dim=1).transpose(0, 1)
            key_at = torch.arange(slots.numel(), device=q_RNH.device)
            step = max(1, _BLOCK_ELEMENTS // (plan.num_q_heads * slots.numel()))
            for row in range(lo, hi, step):
                end = min(row + step, hi)
                p = positions[row:end, None]
                logits = torch.bmm(q_RNH[row:end].float().transpose(0, 1) * scale, k)
                if logit_cap:
                    logits = logit_cap * torch.tanh(logits / logit_cap)
                hidden = key_at[None, :] > p
                if sliding_window is not None:
                    hidden |= key_at[None, :] <= p - sliding_window
                logits.masked_fill_(hidden, float("-inf"))
                out[row:end] = (
                    torch.bmm(torch.softmax(logits, dim=-1), v).transpose(0, 1).to(out.dtype)
                )
        return out
