"""Rows of an attention call cut into blocks by absolute position."""

from __future__ import annotations

from rag_kernels.attention.plan import PositionCausalPlan

SMALLEST_BLOCK = 8
"""A mask has an entry per pair of blocks: smaller ones would let a client's option take gigabytes of a long prompt."""
LARGEST_BLOCK = 1 << 20


def check_block(tokens: int) -> None:
    """Refuse a size of block that no mask is made of; one line."""
    if not SMALLEST_BLOCK <= tokens <= LARGEST_BLOCK:
        raise ValueError(
            f"block is {tokens} tokens; it must be between {SMALLEST_BLOCK} and {LARGEST_BLOCK}."
        )


def block_range(plan: PositionCausalPlan, request: int, size: int) -> tuple[int, int] | None:
    """First and last block that hold rows of a request; None where it has no rows."""
    cut = [block for block in plan.blocks if block.request == request]
    if not cut:
        return None
    return (cut[0].open_len - 1) // size, (cut[-1].kv_len - 1) // size
