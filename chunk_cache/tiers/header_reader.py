"""What a record's header tells of it: the half that all readers of encoded records share."""

from __future__ import annotations

import abc
from collections.abc import Mapping

from torch import Tensor

from chunk_cache.codecs.base import codec_named
from chunk_cache.keys import TokenIds
from chunk_cache.layouts.base import LayerKV
from chunk_cache.tiers.encoding import RecordHeader


class HeaderReader(abc.ABC):
    """A :class:`~chunk_cache.LayerReader` of a record whose header is here; :meth:`layer` is up to the place.

    Attributes
    ----------
    header : RecordHeader
        Of the record.
    """

    header: RecordHeader

    @property
    def token_ids(self) -> TokenIds:
        """Token ids of the record."""
        return self.header.token_ids

    @property
    def side(self) -> Mapping[str, Tensor]:
        """Side tensors of the record."""
        return self.header.side

    @property
    def base_position(self) -> int:
        """Position of its first token when it was computed."""
        return self.header.base_position

    @property
    def layout(self) -> str:
        """Name of its layout."""
        return self.header.layout

    @property
    def codec(self) -> str:
        """Name of the codec that its layers went through."""
        return self.header.codec

    @property
    def is_lossless(self) -> bool:
        """Whether every bit is as the model computed it."""
        return codec_named(self.header.codec).is_lossless

    @property
    def num_layers(self) -> int:
        """Number of layers L."""
        return self.header.num_layers

    @property
    def num_tokens(self) -> int:
        """Number of tokens T."""
        return self.header.num_tokens

    @abc.abstractmethod
    def layer(self, index: int, start: int = 0, end: int | None = None) -> LayerKV:
        """Tokens ``[start, end)`` of one layer, see :meth:`chunk_cache.LayerReader.layer`."""
