"""Attention of rows that lie anywhere in a prompt, causal by absolute position: a plan, and kernels by device."""

from __future__ import annotations

from rag_kernels.attention.base import AttentionCall, AttentionKernel, LogitRules
from rag_kernels.attention.call import position_causal_attention, prepare_attention
from rag_kernels.attention.choice import ATTENTION_KERNELS, choose_kernel
from rag_kernels.attention.mask import BlockMask, RequestBlocks
from rag_kernels.attention.plan import PositionCausalPlan, RowBlock
from rag_kernels.attention.planning import plan_position_causal

__all__ = [
    "ATTENTION_KERNELS",
    "AttentionCall",
    "AttentionKernel",
    "BlockMask",
    "LogitRules",
    "PositionCausalPlan",
    "RequestBlocks",
    "RowBlock",
    "choose_kernel",
    "plan_position_causal",
    "position_causal_attention",
    "prepare_attention",
]
