"""PowerAttention (arXiv 2503.03588): a window, a sink, and the blocks at distances that are powers of two."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rag_kernels.sparse.static_blocks import StaticBlocks, WindowedConfig


@dataclass(frozen=True, kw_only=True)
class PowerConfig(WindowedConfig):
    """Defaults of the paper: blocks of 256, a window of 5 and one sink block, 10 blocks for the last row of 32K."""


class PowerAttention(StaticBlocks):
    """Reads O(log n) blocks per row, and reaches every block within O(log n) layers.

    With the distance in blocks ``d = i // b - j // b``, a row at ``i`` reads the key at ``j <= i`` where ``d`` is less
    than the window, or a power of two, or where ``j`` lies in the first blocks. Information moves by one such distance
    per layer: after ``L`` layers a row has seen every block at a distance that is a sum of at most ``L`` of them. With
    a window of 5 and no sink that is every block closer than 13, 29, 61, 125 and 253 for 2 to 6 layers; a sliding
    window of 9 comes 8 blocks further per layer.

    The paper trains models with this mask. A model that was not trained with it loses much where all layers are sparse;
    ``dense_layers=2`` is the hybrid of the paper's RULER runs, 2 layers in every 7. The paper does not say which ones:
    ``dense_offset`` does here. Decoding reads the same blocks.

    https://arxiv.org/abs/2503.03588
    """

    name = "power"
    config_type = PowerConfig
    config: PowerConfig

    def keeps(self, row: Tensor, key: Tensor) -> Tensor:
        """Apply the rule of the paper's algorithm 1."""
        distance = row - key
        is_power = (distance & (distance - 1)) == 0
        return (distance < self.config.window) | is_power | (key < self.config.sink)
