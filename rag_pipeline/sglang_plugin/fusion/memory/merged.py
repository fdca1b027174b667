"""Two memories of one conversation as one of the same size: what a question that spans two episodes loads."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from chunk_cache import ChunkKV, LayerKV, LoadingChunk, TokenIds
from chunk_cache.retention import Kept, merge_kept, own_columns, own_ranks
from rag_pipeline.sglang_plugin.fusion.memory.records import (
    OWN_FREE,
    OWN_SPANS,
    POSITIONS,
    SCORES,
)

Stored = ChunkKV | LoadingChunk


class MergedMemory:
    """A :class:`~chunk_cache.LayerReader` that merges each layer when it is asked for.

    Parameters
    ----------
    one, other : ChunkKV or LoadingChunk
        Memory records of the same slots and the same true position behind them, made by one rule.
    """

    def __init__(self, one: Stored, other: Stored) -> None:
        if (one.base_position, one.num_tokens, one.layout) != (
            *(other.base_position, other.num_tokens, other.layout),
        ):
            raise ValueError("memories of different histories cannot be merged")
        self._parts = (one, other)
        self._layers: dict[int, Kept] = {}

    @property
    def layout(self) -> str:
        """Of both."""
        return self._parts[0].layout

    @property
    def token_ids(self) -> TokenIds:
        """Token ids of both."""
        return self._parts[0].token_ids

    @property
    def base_position(self) -> int:
        """Of both."""
        return self._parts[0].base_position

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return self._parts[0].num_layers

    @property
    def num_tokens(self) -> int:
        """Number of slots."""
        return self._parts[0].num_tokens

    @property
    def codec(self) -> str:
        """Codec of the part that lost more."""
        one, other = self._parts
        return other.codec if one.is_lossless else one.codec

    @property
    def is_lossless(self) -> bool:
        """Whether both are."""
        return all(part.is_lossless for part in self._parts)

    @property
    def num_filled(self) -> int:
        """Layers that nobody has to wait for."""
        return min(getattr(part, "num_filled", part.num_layers) for part in self._parts)

    @property
    def side(self) -> Mapping[str, Tensor]:
        """Positions of the merged slots, once all layers were merged; merges those that are left."""
        kept = [self._merged(index) for index in range(self.num_layers)]
        return {
            POSITIONS: torch.stack([one.positions for one in kept]),
            SCORES: torch.stack([one.scores for one in kept]),
        }

    def layer(self, index: int, start: int = 0, end: int | None = None) -> LayerKV:
        """Slots ``[start, end)`` of one merged layer; waits for both parts."""
        kept = self._merged(index)
        return LayerKV(kept.k[start:end], kept.v[start:end])

    def _merged(self, index: int) -> Kept:
        if index not in self._layers:
            is_ranked = any(OWN_SPANS in part.side for part in self._parts)
            one, other = (_kept(part, index, is_ranked=is_ranked) for part in self._parts)
            self._layers[index] = merge_kept(one, other, self.num_tokens)
        return self._layers[index]


def _kept(part: Stored, index: int, *, is_ranked: bool) -> Kept:
    """One layer; with the ranks by which its slots stayed, where one of the two memories has own tokens."""
    k, v = part.layer(index)
    positions, scores = part.side[POSITIONS][index], part.side[SCORES][index]
    ranks = None
    if is_ranked:
        spans, free = part.side.get(OWN_SPANS), part.side.get(OWN_FREE)
        own = own_columns(positions, () if spans is None else spans)
        ranks = own_ranks(scores.float(), own, 0 if free is None else int(free))
    return Kept(k=k, v=v, positions=positions, scores=scores, ranks=ranks)
