"""Records that arrive as a benchmark or a test lets them: what a slow tier looks like to its reader."""

from __future__ import annotations

from collections.abc import Callable

from chunk_cache import ChunkKV, LayerKV, LayerReader


class SlowReader:
    """A :class:`~chunk_cache.LayerReader` of another one, with something before each layer.

    Parameters
    ----------
    record : ChunkKV or LayerReader
        What is read.
    before : callable
        Called with the number of a layer before it is read; may wait, and may raise.
    """

    def __init__(self, record: ChunkKV | LayerReader, before: Callable[[int], object]) -> None:
        self._record, self._before = record, before
        self.token_ids, self.base_position = record.token_ids, record.base_position
        self.layout, self.codec, self.is_lossless = record.layout, record.codec, record.is_lossless
        self.num_layers, self.num_tokens = record.num_layers, record.num_tokens

    def layer(self, index: int, start: int = 0, end: int | None = None) -> LayerKV:
        """Tokens ``[start, end)`` of one layer, when it is their time."""
        self._before(index)
        return self._record.layer(index, start, end)
