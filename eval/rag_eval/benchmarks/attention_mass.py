"""How much of dense attention's softmax mass an attention method keeps, and how many keys it reads for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from rag_kernels.attention.mask import RequestBlocks

CELL = 32
"""Rows and keys of a cell. Blocks of every method that is compared are whole cells."""

_EVERY = 8
"""One row in so many is looked at: what neighbouring rows read is much alike, and weights of all rows take minutes."""
_ROWS = 64
"""Rows whose weights are held at once: those of one head stay in the processor's cache."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Kept:
    """What a method keeps of one layer, or of several added up.

    Attributes
    ----------
    mass : Tensor
        fp64 ``[Hq]``: softmax mass of dense attention on the keys that are read, summed over ``rows``.
    rows : int
        Rows; each has a mass of 1.
    read, seen : float
        Pairs of a row and a key that are read, and those that causality allows, the mean over the heads.
    """

    mass: Tensor
    rows: int
    read: float
    seen: float

    @property
    def recall(self) -> Tensor:
        """Share of the mass per head, the mean over the rows; fp64 ``[Hq]``."""
        return self.mass / self.rows


class MassGrid:
    """Dense attention of all rows of a prompt in one layer, added up by cells.

    Parameters
    ----------
    q_RHD, k_RND : Tensor
        Rotated queries and keys of positions ``0 .. R - 1``; computed in fp32.
    scale : float
        Softmax scale.
    """

    def __init__(self, q_RHD: Tensor, k_RND: Tensor, scale: float) -> None:
        length, heads, _ = q_RHD.shape
        cells = -(-length // CELL)
        shared = heads // k_RND.shape[1]
        looked_at = torch.arange(_EVERY - 1, length, _EVERY)
        at = torch.arange(length)
        queries = q_RHD[looked_at].float().transpose(0, 1) * scale  # [H, r, D]
        keys = k_RND.float().permute(1, 2, 0).contiguous()  # [N, D, K]
        by_cell = torch.zeros(heads, cells, cells)
        for lo in range(0, len(looked_at), _ROWS):
            rows = looked_at[lo : lo + _ROWS]
            first, end = int(rows[0]), int(rows[-1]) + 1
            width = -(-end // CELL)
            hidden = at[None, first:end] > rows[:, None]
            weights = torch.zeros(len(rows), width * CELL)
            for head in range(heads):
                logits = queries[head, lo : lo + _ROWS] @ keys[head // shared, :, :end]
                logits[:, first:].masked_fill_(hidden, float("-inf"))
                torch.softmax(logits, dim=-1, out=logits)
                weights[:, :end] = logits
                by_key = weights.view(-1, width, CELL).sum(dim=2)
                by_cell[head, :, :width].index_add_(0, rows // CELL, by_key)
        self._mass = by_cell
        self._rows = len(looked_at)
        size = torch.bincount(at // CELL)
        pairs = size[:, None] * size[None, :]
        self._pairs = pairs.tril(-1) + torch.diag(size * (size + 1) // 2)

    def kept(self, blocks: RequestBlocks | None) -> Kept:
        """What a mask keeps; None reads everything.

        Parameters
        ----------
        blocks : RequestBlocks or None
            Of the only request of a call with all rows of the prompt.

        Raises
        ------
        ValueError
            Its blocks are no whole cells.
        """
        read = read_cells(blocks, self._mass.shape[1])
        return Kept(
            mass=(self._mass * read).sum(dim=(1, 2), dtype=torch.float64),
            rows=self._rows,
            read=float((self._pairs * read).sum()) / read.shape[0],
            seen=float(self._pairs.sum()),
        )


def read_cells(blocks: RequestBlocks | None, cells: int) -> Tensor:
    """Cells that a mask lets rows read, by the rule of masks; bool ``[H, cells, cells]``."""
    own = torch.arange(cells)
    causal = own[None, :] <= own[:, None]
    if blocks is None:
        return causal[None]
    if blocks.query_block % CELL or blocks.key_block % CELL:
        raise ValueError(
            f"blocks of {blocks.query_block} rows and {blocks.key_block} keys; mass is counted in cells of "
            f"{CELL}: give multiples."
        )
    # The last row of a cell stands for all of them: blocks are whole cells.
    positions = own * CELL
    by_block = blocks.rows(positions)  # [H, cells, key blocks]
    per_block = blocks.key_block // CELL
    return by_block.repeat_interleave(per_block, dim=2)[..., :cells] & causal


def added(parts: Sequence[Kept]) -> Kept:
    """Layers with the same heads, or prompts, as one; their heads are added up one by one."""
    return Kept(
        mass=torch.stack([part.mass for part in parts]).sum(dim=0),
        rows=sum(part.rows for part in parts),
        read=sum(part.read for part in parts),
        seen=sum(part.seen for part in parts),
    )


def density_of(parts: Sequence[Kept]) -> float:
    """Share of the keys that are read, layers and prompts together."""
    return sum(part.read for part in parts) / sum(part.seen for part in parts)
