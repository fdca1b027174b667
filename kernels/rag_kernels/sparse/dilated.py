"""Dilated sliding window (Longformer, arXiv 2004.05150): a window with gaps."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rag_kernels.sparse.static_blocks import StaticBlocks, WindowedConfig


@dataclass(frozen=True, kw_only=True)
class DilatedConfig(WindowedConfig):
    """Defaults of PowerAttention's baseline: 10 blocks out of 20. ``window`` and ``gap`` set the density."""

    window: int = 20
    """Blocks that the window spans, the row's own and the gaps counted."""
    sink: int = 0
    """First blocks of the prompt that every row reads."""
    gap: int = 1
    """Blocks left out between two that are read."""

    def __post_init__(self) -> None:
        """Refuse options that name no pattern."""
        super().__post_init__()
        if self.gap < 0:
            raise ValueError(f"gap is {self.gap} blocks; it must be at least 0.")


class DilatedAttention(StaticBlocks):
    """Reads every ``gap + 1``-th block of a window.

    Without sinks, information moves by multiples of ``gap + 1`` blocks alone: the others are never seen, in whatever
    depth. The paper gives heads different gaps, by tokens; here all heads have the same one, by blocks.

    https://arxiv.org/abs/2004.05150
    """

    name = "dilated"
    config_type = DilatedConfig
    config: DilatedConfig

    def keeps(self, row: Tensor, key: Tensor) -> Tensor:
        """Keep the blocks of the window that are no gaps, and the sinks."""
        distance = row - key
        is_read = (distance < self.config.window) & (distance % (self.config.gap + 1) == 0)
        return is_read | (key < self.config.sink)
