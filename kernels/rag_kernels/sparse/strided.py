"""Strided attention (Sparse Transformers, arXiv 1904.10509): a window and every ``stride``-th block before it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rag_kernels.sparse.static_blocks import StaticBlocks, WindowedConfig


@dataclass(frozen=True, kw_only=True)
class StridedConfig(WindowedConfig):
    """Defaults of PowerAttention's baseline: 6 + 3 + 1 blocks for the last row of 32K. ``stride`` sets the density."""

    window: int = 6
    """Blocks of the window, the row's own counted."""
    stride: int = 32
    """Distance of the slashes, in blocks."""

    def __post_init__(self) -> None:
        """Refuse options that name no pattern."""
        super().__post_init__()
        if self.stride < 1:
            raise ValueError(f"stride is {self.stride} blocks; it must be at least 1.")


class StridedAttention(StaticBlocks):
    """Reads the blocks at distances that are multiples of the stride.

    The paper gives the two parts to two heads, by tokens; here all heads read both, by blocks, and the sinks that
    PowerAttention's comparison adds.

    https://arxiv.org/abs/1904.10509
    """

    name = "strided"
    config_type = StridedConfig
    config: StridedConfig

    def keeps(self, row: Tensor, key: Tensor) -> Tensor:
        """Keep the window, the slashes and the sinks."""
        distance = row - key
        is_slash = distance % self.config.stride == 0
        return (distance < self.config.window) | is_slash | (key < self.config.sink)
