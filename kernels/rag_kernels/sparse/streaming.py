"""StreamingLLM's pattern (arXiv 2309.17453): the first blocks and a sliding window."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rag_kernels.sparse.static_blocks import StaticBlocks, WindowedConfig


@dataclass(frozen=True, kw_only=True)
class StreamingConfig(WindowedConfig):
    """``window`` sets the density: a row reads ``window + sink`` blocks of any prompt."""

    window: int = 9
    """Blocks of the window, the row's own counted."""


class StreamingAttention(StaticBlocks):
    """Reads attention sinks and what is near.

    The paper keeps 4 tokens as sinks and evicts what leaves the window, positions counted within the cache. Here sinks
    are whole blocks, keys stay where they are, with their own positions, and nothing is evicted: the pattern alone.

    https://arxiv.org/abs/2309.17453
    """

    name = "streaming"
    config_type = StreamingConfig
    config: StreamingConfig

    def keeps(self, row: Tensor, key: Tensor) -> Tensor:
        """Keep the window and the sinks."""
        return (row - key < self.config.window) | (key < self.config.sink)
