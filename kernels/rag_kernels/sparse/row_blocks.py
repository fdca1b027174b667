"""Rows of an attention call cut into blocks by absolute position."""

from __future__ import annotations

from rag_kernels.attention.plan import PositionCausalPlan

SMALLEST_BLOCK = 8
"""A mask has an entry per pair of blocks: smaller ones would let a client's option take gigabytes of a long prompt."""
LARGEST_BLOCK = 1 << 20
LARGEST_MASK = 4 << 30
"""Bytes that one layer's mask of a request may take while it is made: small blocks of a long prompt would take more."""


def check_block(tokens: int) -> None:
    """Refuse a size of block that no mask is made of; one line."""
    if not SMALLEST_BLOCK <= tokens <= LARGEST_BLOCK:
        raise ValueError(
            f"block is {tokens} tokens; it must be between {SMALLEST_BLOCK} and {LARGEST_BLOCK}."
        )


def check_mask(num_heads: int, query_blocks: int, key_blocks: int, bytes_each: int) -> None:
    """Refuse a mask that takes more than :data:`LARGEST_MASK`; one line."""
    needed = num_heads * query_blocks * key_blocks * bytes_each
    if needed > LARGEST_MASK:
        raise ValueError(
            f"a mask of {query_blocks} by {key_blocks} blocks for {num_heads} heads would take {needed >> 20} MiB; "
            "ask for larger blocks."
        )


def block_range(plan: PositionCausalPlan, request: int, size: int) -> tuple[int, int] | None:
    """First and last block that hold rows of a request; None where it has no rows."""
    cut = [block for block in plan.blocks if block.request == request]
    if not cut:
        return None
    return (cut[0].open_len - 1) // size, (cut[-1].kv_len - 1) // size
