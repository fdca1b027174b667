"""Loading of spans on the CPU: blocks of spans that fit the cache, one call of each tensor operation per block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rag_kernels.paged import scatter_kv_inplace
from rag_kernels.rotary import rotate_into, spread_cos
from rag_kernels.span_load import SpanLoadPlan

_BLOCK_ELEMENTS = 65536
"""Key elements of a block per thread: two fp32 copies of them fit a core's second cache."""


class _Piece(NamedTuple):
    """Tokens ``[start, end)`` of a span; the first of them is token ``first`` of the plan."""

    span: int
    start: int
    end: int
    first: int

    def of(self, sources: Sequence[Tensor]) -> Tensor:
        return sources[self.span][self.start : self.end]

    @property
    def tokens(self) -> slice:
        return slice(self.first, self.first + self.end - self.start)


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """Pieces of spans that are loaded together: all are rotated, or none is.

    Attributes
    ----------
    pieces : list
        What of which span.
    slots : Tensor
        int64 ``[B]``.
    tables : tuple of Tensor or None
        Cosines ``[B, 1, rotary_dim]`` and sines ``[B, 1, rotary_dim / 2]``, or of one row for all; None for a block
        that is copied.
    """

    pieces: list[_Piece]
    slots: Tensor
    tables: tuple[Tensor, Tensor] | None


def load_spans_cpu(
    k_pool: Tensor,
    v_pool: Tensor,
    k_srcs: Sequence[Tensor],
    v_srcs: Sequence[Tensor],
    plan: SpanLoadPlan,
) -> None:
    """See :func:`rag_kernels.load_spans_inplace`."""
    row = max(1, k_pool.shape[1:].numel())
    room = max(1, _BLOCK_ELEMENTS * torch.get_num_threads() // row)
    if room not in plan.blocks:
        plan.blocks[room] = _cut(plan, room, False) + _cut(plan, room, True)
    scratch: Tensor | None = None
    for block in plan.blocks[room]:
        if block.tables is None:
            k = _joined(k_srcs, block)
        else:
            if scratch is None:  # the first block that is rotated is none smaller than the others
                scratch = torch.empty((2, block.slots.numel(), *k_pool.shape[1:]))
            x, out = scratch[:, : block.slots.numel()]
            if len(block.pieces) == 1:
                x.copy_(block.pieces[0].of(k_srcs))
            else:
                torch.cat([piece.of(k_srcs) for piece in block.pieces], out=x)
            k = rotate_into(out, x, *block.tables, plan.spec)
        scatter_kv_inplace(k_pool, block.slots, k)
        scatter_kv_inplace(v_pool, block.slots, _joined(v_srcs, block))


def _joined(sources: Sequence[Tensor], block: Block) -> Tensor:
    parts = [piece.of(sources) for piece in block.pieces]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _cut(plan: SpanLoadPlan, room: int, moved: bool) -> list[Block]:
    """Blocks of ``room`` tokens, but the last, of the spans that are rotated or of the others."""
    blocks: list[list[_Piece]] = []
    left = first = 0
    for span, (length, delta) in enumerate(zip(plan.lengths, plan.deltas, strict=True)):
        start = 0
        while start < length and bool(delta) is moved:
            if not left:
                blocks.append([])
                left = room
            end = min(length, start + left)
            blocks[-1].append(_Piece(span, start, end, first + start))
            left -= end - start
            start = end
        first += length
    return [_block(plan, pieces, moved) for pieces in blocks]


def _block(plan: SpanLoadPlan, pieces: list[_Piece], moved: bool) -> Block:
    slots = torch.cat([plan.slots[piece.tokens] for piece in pieces])
    if not moved:
        return Block(pieces, slots, None)
    rows = torch.cat([plan.token_rows[piece.tokens] for piece in pieces])
    if bool((rows == rows[0]).all()):
        rows = rows[:1]
    cos, sin = plan.cos[rows][:, None], plan.sin[rows][:, None]
    return Block(pieces, slots, (spread_cos(cos, plan.spec), sin))
