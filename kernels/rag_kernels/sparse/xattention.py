"""XAttention (arXiv 2503.16428): blocks by the sum of their antidiagonals."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rag_kernels.sparse.scored_blocks import (
    RequestRows,
    ScoredBlocks,
    ScoredConfig,
    most_mass,
    most_scored,
)

_GROUPS = 256
"""Groups of rows whose logits are held at once: with 128K keys in groups of 8, 16 MiB per head."""


@dataclass(frozen=True, kw_only=True)
class XAttentionConfig(ScoredConfig):
    """Defaults of the paper. ``blocks`` instead of the threshold makes the density that of another method."""

    stride: int = 8
    """Tokens of a group: one in so many entries of the attention matrix is looked at."""
    threshold: float = 0.9
    """Share of the estimated mass that the chosen blocks hold; 1 keeps every block, whatever is estimated."""
    blocks: int = 0
    """Blocks that a row reads, its own counted; 0 to go by the threshold."""
    sink: int = 1
    """First blocks of the prompt that every row reads."""

    def __post_init__(self) -> None:
        """Refuse options that name no choice."""
        super().__post_init__()
        if self.stride < 1 or self.block % self.stride:
            raise ValueError(f"stride is {self.stride}; it must divide block, {self.block}.")
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold is {self.threshold}; it must be above 0 and at most 1.")
        if self.blocks < 0:
            raise ValueError(f"blocks is {self.blocks}; it must be at least 0.")
        if self.sink < 0:
            raise ValueError(f"sink is {self.sink} blocks; it must be at least 0.")


class XAttention(ScoredBlocks):
    """Estimates the mass of a block by every ``stride``-th antidiagonal, and keeps the heaviest blocks.

    Rows and keys are put into groups of ``stride`` tokens. The logit of two groups is the mean over the antidiagonal
    between them: first row with last key, and so on. A softmax over the groups of keys, summed up by block, is the
    mass. Where only some rows of a block are computed, groups are made of those in their order; a group that is not
    full repeats none and has a smaller logit. The paper's thresholds per head come from a search that is not done here.

    https://arxiv.org/abs/2503.16428
    """

    name = "xattention"
    config_type = XAttentionConfig
    config: XAttentionConfig

    @property
    def prefix_unit(self) -> int:
        """A block: its rows choose together, by keys in front of them and their own."""
        return self.config.block

    def choose(self, rows: RequestRows) -> Tensor:
        """Choose by the threshold, or so many."""
        mass = antidiagonal_mass(rows, self.config.stride)
        is_before = rows.is_before
        is_sink = torch.arange(mass.shape[2], device=mass.device) < self.config.sink
        if self.config.blocks:
            mass = mass.masked_fill(is_sink, float("inf"))
            count = max(self.config.blocks, self.config.sink + 1) - 1
            counts = torch.full((mass.shape[1],), count, device=mass.device)
            return most_scored(mass, is_before, counts)
        if self.config.threshold == 1:
            return is_before[None]
        # What a row reads anyway, its own block and the sinks, is of the share: only what is missing is chosen.
        own = torch.arange(rows.first, rows.last + 1, device=mass.device)
        is_given = is_sink[None, :] | (
            torch.arange(mass.shape[2], device=mass.device)[None, :] == own[:, None]
        )
        given = (mass * is_given).sum(dim=-1, keepdim=True)
        rest = mass.masked_fill(is_given | ~is_before, 0.0)
        total = rest.sum(dim=-1, keepdim=True)
        missing = (self.config.threshold * (total + given) - given).clamp(min=0)
        share = torch.where(total > 0, missing / total.clamp(min=1e-30), 0.0)
        return most_mass(rest, share) | (is_sink[None, None, :] & is_before)


def antidiagonal_mass(rows: RequestRows, stride: int) -> Tensor:
    """Estimated attention mass of each pair of blocks; fp32 ``[Hq, Q, K]``, sums over the groups of a block's rows."""
    device = rows.positions.device
    num_rows, heads, dim = rows.q.shape
    per_block = rows.block // stride
    # Group of a row: its block, and how many rows of the block stand before it.
    at = rows.query_block
    starts = torch.searchsorted(at, torch.arange(rows.num_query_blocks, device=device))
    rank = torch.arange(num_rows, device=device) - starts[at]
    group = at * per_block + rank // stride
    q = rows.q.new_zeros(rows.num_query_blocks * per_block, stride, heads, dim)
    q[group, stride - 1 - rank % stride] = rows.q
    reach = torch.full((q.shape[0],), -1, device=device).scatter_reduce_(
        0, group, rows.positions, "amax"
    )
    num_keys = rows.k.shape[0]
    key_groups = (rows.last + 1) * per_block
    k = rows.k.new_zeros(key_groups * stride, *rows.k.shape[1:])
    k[:num_keys] = rows.k
    k = k.view(key_groups, stride, -1, dim)
    begins = torch.arange(key_groups, device=device) * stride
    shared = heads // k.shape[2]
    mass = q.new_zeros(heads, rows.num_query_blocks, rows.last + 1)
    for lo in range(0, q.shape[0], _GROUPS):
        part, seen = q[lo : lo + _GROUPS], reach[lo : lo + _GROUPS]
        block = torch.arange(lo, lo + len(part), device=device) // per_block
        hidden = begins[None, :] > seen[:, None]
        for head in range(heads):
            logits = part[:, :, head].flatten(1) @ k[:, :, head // shared].flatten(1).t()
            logits = (logits * (rows.scale / stride)).masked_fill_(hidden, float("-inf"))
            weights = logits.softmax(dim=-1).nan_to_num_(0.0)  # groups without rows see nothing
            by_block = weights.view(len(part), rows.last + 1, per_block).sum(dim=-1)
            mass[head].index_add_(0, block, by_block)
    return mass
