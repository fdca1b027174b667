"""KIVI with 8 bits."""

from __future__ import annotations

from torch import Tensor

from chunk_cache.codecs.kivi import KiviCodec


class Kivi8Codec(KiviCodec):
    """256 levels, one byte each; see :class:`KiviCodec`."""

    name = "kivi8"
    bits = 8

    def pack(self, codes: Tensor) -> Tensor:
        """One byte per level, as they are."""
        return codes.contiguous()

    def unpack(self, packed: Tensor, num_tokens: int) -> Tensor:
        """One byte per level, as they are."""
        return packed

    def packed_tokens(self, num_tokens: int) -> int:
        """As many as there are tokens."""
        return num_tokens
