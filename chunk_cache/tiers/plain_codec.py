"""The codec that changes nothing, behind the names of the codecs' own package."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from chunk_cache.errors import ChunkCacheError
from chunk_cache.layouts.base import LayerKV
from chunk_cache.records import ChunkKV


class PlainCodec:
    """Keys and values as they are."""

    def encode(self, layer: LayerKV) -> dict[str, Tensor]:
        """Name the two tensors of a layer."""
        return {"k": layer.k, "v": layer.v}

    def decode(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> LayerKV:
        """Return the two tensors."""
        return LayerKV(tensors["k"], tensors["v"])


def codec_named(name: str) -> PlainCodec:
    """Return a codec.

    Raises
    ------
    ChunkCacheError
        For a name that is not known.
    """
    if name != "plain":
        raise ChunkCacheError(f"codec {name!r} is not implemented: allowed is 'plain'")
    return PlainCodec()


def encode_layers(record: ChunkKV, wanted: str) -> tuple[str, list[dict[str, Tensor]]]:
    """Encode every layer of a record; returns the name of the codec that was used, and each layer's tensors."""
    codec = codec_named(wanted)
    return wanted, [codec.encode(record.layer(index)) for index in range(record.num_layers)]
