"""LongNet's dilated attention (arXiv 2307.02486): segments that grow, read with gaps that grow alike."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rag_kernels.sparse.static_blocks import StaticBlocks, StaticConfig


@dataclass(frozen=True, kw_only=True)
class LongNetConfig(StaticConfig):
    """Defaults of PowerAttention's baseline: segments of 8 to 128 blocks, rates of 1 to 16.

    A row reads at most ``segment`` blocks of each level: ``segment`` sets the density, ``levels`` how far rows read.
    """

    segment: int = 8
    """Blocks of the shortest segment, which is read without gaps."""
    levels: int = 5
    """Lengths of segments, each twice the one before, and rates alike."""

    def __post_init__(self) -> None:
        """Refuse options that name no pattern."""
        super().__post_init__()
        if self.segment < 1:
            raise ValueError(f"segment is {self.segment} blocks; it must be at least 1.")
        if not 1 <= self.levels <= 20:
            raise ValueError(f"levels is {self.levels}; it must be between 1 and 20.")


class LongNetAttention(StaticBlocks):
    """Reads, of each segment that holds the row, the blocks that stand at a multiple of the rate before it.

    The paper shifts the dilation from head to head, so that head ``h`` sees blocks ``h`` modulo the rate, and weighs
    the levels by their softmax denominators. Here all heads read what the paper's heads read together where rows and
    keys have the same remainder, in one softmax. Segments have fixed borders: what lies just before one is missed.

    https://arxiv.org/abs/2307.02486
    """

    name = "longnet"
    config_type = LongNetConfig
    config: LongNetConfig

    def keeps(self, row: Tensor, key: Tensor) -> Tensor:
        """Keep the union of the levels."""
        kept = torch.zeros_like(row - key, dtype=torch.bool)
        for level in range(self.config.levels):
            rate, length = 1 << level, self.config.segment << level
            kept |= (row // length == key // length) & ((row - key) % rate == 0)
        return kept
