"""Loading of spans on the CPU: by the library where it serves the tensors.

Otherwise blocks of spans that fit the cache, one call of each tensor operation per block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rag_kernels.native.load import native_load
from rag_kernels.paged import scatter_kv_inplace
from rag_kernels.rotary import rotate_into, spread_cos
from rag_kernels.span_load import SpanLoadPlan

_BLOCK_ELEMENTS = 524288
"""Key elements of a block: its two fp32 copies stay in the caches between the operations."""
_ALONE_ELEMENTS = 16384
"""Key elements from which a span is rotated by itself: a table per token takes twice as long as one for all."""


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


class _Turn(NamedTuple):
    """Rotation of tokens of a block: cosines ``[B, 1, rotary_dim]`` and sines, or one row of both for all."""

    tokens: slice
    wide: Tensor
    sin: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """Pieces of spans that are loaded together.

    Attributes
    ----------
    pieces : list
        What of which span.
    slots : Tensor
        int64 ``[B]``.
    turns : list
        Cover the block; none where it is copied as it is.
    """

    pieces: list[_Piece]
    slots: Tensor
    turns: list[_Turn]


def load_spans_cpu(
    k_pool: Tensor,
    v_pool: Tensor,
    k_srcs: Sequence[Tensor],
    v_srcs: Sequence[Tensor],
    plan: SpanLoadPlan,
) -> None:
    """See :func:`rag_kernels.load_spans_inplace`."""
    if native_load(k_pool, v_pool, k_srcs, v_srcs, plan):
        return
    row = max(1, k_pool.shape[1:].numel())
    blocks = plan.blocks.get(row)
    if blocks is None:
        blocks = plan.blocks[row] = _cut(plan, row, False) + _cut(plan, row, True)
    for block in blocks:
        k = _joined(k_srcs, block)
        if block.turns:
            x = k.float()
            k = torch.empty_like(x)
            for tokens, wide, sin in block.turns:
                rotate_into(k[tokens], x[tokens], wide, sin, plan.spec)
        scatter_kv_inplace(k_pool, block.slots, k)
        scatter_kv_inplace(v_pool, block.slots, _joined(v_srcs, block))


def _joined(sources: Sequence[Tensor], block: Block) -> Tensor:
    parts = [piece.of(sources) for piece in block.pieces]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _cut(plan: SpanLoadPlan, row: int, moved: bool) -> list[Block]:
    """Blocks of equal size, but the last, of the spans that are rotated or of the others; ``row`` elements per token."""
    room = max(1, _BLOCK_ELEMENTS // row)
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
    return [
        Block(
            pieces,
            torch.cat([plan.slots[piece.tokens] for piece in pieces]),
            _turns(plan, pieces, max(1, _ALONE_ELEMENTS // row)) if moved else [],
        )
        for pieces in blocks
    ]


def _turns(plan: SpanLoadPlan, pieces: list[_Piece], alone: int) -> list[_Turn]:
    """One rotation per piece of ``alone`` tokens or more, and one per run of shorter pieces."""
    runs: list[list[_Piece]] = []
    for piece in pieces:
        if runs and max(_count(piece), _count(runs[-1][-1])) < alone:
            runs[-1].append(piece)
        else:
            runs.append([piece])
    turns, start = [], 0
    for run in runs:
        rows = torch.cat([plan.token_rows[piece.tokens] for piece in run])
        end = start + rows.numel()
        if len(run) == 1:
            rows = rows[:1]
        cos, sin = plan.cos[rows][:, None], plan.sin[rows][:, None]
        turns.append(_Turn(slice(start, end), spread_cos(cos, plan.spec), sin))
        start = end
    return turns


def _count(piece: _Piece) -> int:
    return piece.end - piece.start
