"""Keys and values as they are: lossless, and the default."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from chunk_cache.codecs.base import Codec, CodecError, stored
from chunk_cache.layouts.base import LayerKV


class PlainCodec(Codec):
    """Stores ``k`` and ``v`` bit by bit, whatever they hold, of any layout."""

    name = "plain"
    is_lossless = True

    def encode(self, layer: LayerKV) -> dict[str, Tensor]:
        """Return the layer's own tensors; nothing is copied unless they are not contiguous."""
        return {"k": layer.k.contiguous(), "v": layer.v.contiguous()}

    def decode(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> LayerKV:
        """Return the stored tensors; nothing is copied."""
        k, v = stored(tensors, "k", "v")
        if k.dtype != dtype or v.dtype != dtype:
            raise CodecError(f"stored k is {k.dtype} and v {v.dtype}: the record is {dtype}")
        return LayerKV(k, v)
