"""MInference's vertical-slash pattern (arXiv 2407.02490): key blocks and distances that the last queries look at."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rag_kernels.sparse.scored_blocks import RequestRows, ScoredBlocks, ScoredConfig


@dataclass(frozen=True, kw_only=True)
class VerticalSlashConfig(ScoredConfig):
    """``vertical`` and ``slash`` set the density: a row reads at most so many blocks of both."""

    block: int = 64
    """Tokens of a block."""
    vertical: int = 8
    """Key blocks that every row reads, the first block counted."""
    slash: int = 8
    """Distances at which every row reads, its own block and the one before counted."""
    last: int = 64
    """Last rows whose attention is looked at."""

    def __post_init__(self) -> None:
        """Refuse options that name no choice."""
        super().__post_init__()
        for name in ("vertical", "slash", "last"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")


class VerticalSlashAttention(ScoredBlocks):
    """Computes the attention of the last rows alone, and takes for all rows what is heavy there.

    The paper chooses single key columns and single diagonals and gathers the blocks that they touch; its head patterns
    come from a search per model. Here columns and diagonals are summed up to blocks first, so that both counts are in
    blocks, and every head has this pattern. The first block and the two nearest distances are always among them: the
    paper's kernel does so by 30 columns and 100 diagonals.

    https://arxiv.org/abs/2407.02490
    """

    name = "vertical_slash"
    config_type = VerticalSlashConfig
    config: VerticalSlashConfig

    def choose(self, rows: RequestRows) -> Tensor:
        """Choose columns and diagonals per query head."""
        mass = last_rows_mass(rows, self.config.last)  # [H, R', K]
        heads, _, blocks = mass.shape
        columns = mass.sum(dim=1)
        columns[:, 0] = float("inf")
        own = rows.positions[-mass.shape[1] :] // rows.block
        distance = own[:, None] - torch.arange(blocks, device=own.device)[None, :]
        # Blocks behind a row have no mass: they may count for any distance.
        diagonals = mass.new_zeros(heads, blocks).index_add_(
            1, distance.clamp(min=0).flatten(), mass.flatten(1)
        )
        diagonals[:, :2] = float("inf")
        vertical = _highest(columns, self.config.vertical)  # [H, K]
        slash = _highest(diagonals, self.config.slash)  # [H, distances]
        row = torch.arange(rows.first, rows.last + 1, device=own.device)
        away = (row[:, None] - torch.arange(blocks, device=own.device)[None, :]).clamp(min=0)
        return vertical[:, None, :] | slash[:, away]


def last_rows_mass(rows: RequestRows, count: int) -> Tensor:
    """Attention of the last rows, summed up by key block; ``[Hq, R', K]`` with ``R'`` rows, at most ``count``."""
    q, positions = rows.q[-count:], rows.positions[-count:]
    heads, num_keys = q.shape[1], rows.k.shape[0]
    at = torch.arange(num_keys, device=q.device)
    hidden = at[None, :] > positions[:, None]
    mass = q.new_zeros(heads, q.shape[0], rows.last + 1)
    for head in range(heads):
        logits = (q[:, head] * rows.scale) @ rows.k[:, head * rows.k.shape[1] // heads].t()
        weights = logits.masked_fill_(hidden, float("-inf")).softmax(dim=-1)
        mass[head].index_add_(1, at // rows.block, weights)
    return mass


def _highest(scores: Tensor, count: int) -> Tensor:
    """The highest scores of each row; of equal ones the first."""
    order = scores.argsort(dim=-1, descending=True, stable=True)[..., :count]
    chosen = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    return chosen.scatter_(-1, order, True)
