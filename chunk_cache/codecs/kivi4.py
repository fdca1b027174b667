"""KIVI with 4 bits, two tokens per byte."""

from __future__ import annotations

import torch
from torch import Tensor

from chunk_cache.codecs.kivi import KiviCodec


class Kivi4Codec(KiviCodec):
    """16 levels, two in a byte; see :class:`KiviCodec`.

    Byte ``i`` of a channel holds token ``2 i`` in its lower half and token ``2 i + 1`` in its upper one. The upper
    half of the last byte is 0 where the number of tokens is odd.
    """

    name = "kivi4"
    bits = 4

    def pack(self, codes: Tensor) -> Tensor:
        """Two tokens per byte."""
        packed = codes[0::2].clone()
        packed[: codes.shape[0] // 2] |= codes[1::2] << 4
        return packed

    def unpack(self, packed: Tensor, num_tokens: int) -> Tensor:
        """One byte per level."""
        pairs = torch.stack((packed & 15, packed >> 4), dim=1)
        return pairs.flatten(0, 1)[:num_tokens]

    def packed_tokens(self, num_tokens: int) -> int:
        """Half as many as there are tokens, rounded up."""
        return (num_tokens + 1) // 2
