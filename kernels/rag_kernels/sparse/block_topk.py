"""Block top-k: the blocks of keys whose means agree best with the mean query of a block."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rag_kernels.sparse.scored_blocks import RequestRows, ScoredBlocks, ScoredConfig, most_scored


@dataclass(frozen=True, kw_only=True)
class BlockTopKConfig(ScoredConfig):
    """``blocks`` or ``share`` set the density."""

    block: int = 64
    """Tokens of a block."""
    blocks: int = 16
    """Blocks that a row reads at least, its own and the sinks counted."""
    share: float = 0.0
    """Share of the blocks up to a row's own that it reads at least."""
    sink: int = 1
    """First blocks of the prompt that every row reads."""

    def __post_init__(self) -> None:
        """Refuse options that name no choice."""
        super().__post_init__()
        if self.blocks < 1:
            raise ValueError(f"blocks is {self.blocks}; it must be at least 1, the row's own.")
        if not 0 <= self.share <= 1:
            raise ValueError(f"share is {self.share}; it must be between 0 and 1.")
        if self.sink < 0:
            raise ValueError(f"sink is {self.sink} blocks; it must be at least 0.")


class BlockTopKAttention(ScoredBlocks):
    """MInference's block-sparse pattern: mean pooling over blocks, one product of means per pair, top-k per head.

    The mean query is that of the rows which are computed. Sinks, and the row's own block, are of the k.

    https://arxiv.org/abs/2407.02490
    """

    name = "block_topk"
    config_type = BlockTopKConfig
    config: BlockTopKConfig

    @property
    def prefix_unit(self) -> int:
        """A block: its rows choose together, by keys in front of them and their own."""
        return self.config.block

    def choose(self, rows: RequestRows) -> Tensor:
        """Choose the highest products of means."""
        scores = torch.einsum("qhd,khd->hqk", mean_queries(rows), mean_keys(rows, rows.q.shape[1]))
        device = rows.positions.device
        scores[..., : self.config.sink] = float("inf")
        own = torch.arange(rows.first, rows.last + 1, device=device)
        wanted = torch.ceil((own + 1) * self.config.share).long().clamp(min=self.config.blocks)
        wanted = wanted.clamp(min=self.config.sink + 1)
        return most_scored(scores, rows.is_before, wanted - 1)  # the own block is read anyway


def mean_queries(rows: RequestRows) -> Tensor:
    """Mean query of each block, ``[Q, Hq, D]``; zeros for a block without rows."""
    q, at = rows.q, rows.query_block
    sums = q.new_zeros(rows.num_query_blocks, *q.shape[1:]).index_add_(0, at, q)
    counts = _count(at, rows.num_query_blocks).clamp(min=1)
    return sums / counts[:, None, None]


def mean_keys(rows: RequestRows, num_heads: int) -> Tensor:
    """Mean key of each block, ``[K, Hq, D]``, key heads repeated for the query heads that share them."""
    k = rows.k
    at = torch.arange(k.shape[0], device=k.device) // rows.block
    sums = k.new_zeros(rows.last + 1, *k.shape[1:]).index_add_(0, at, k)
    counts = _count(at, rows.last + 1)
    return (sums / counts[:, None, None]).repeat_interleave(num_heads // k.shape[1], dim=1)


def _count(at: Tensor, num_blocks: int) -> Tensor:
    # bincount would look at the largest, and make the host wait for the device.
    return at.new_zeros(num_blocks).index_add_(0, at, torch.ones_like(at))
