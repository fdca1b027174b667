"""The contract of codecs, the codecs by name, and which one a record is written with.

Shape letters: T tokens, H heads of this rank, D size of the rotated part, D_v of the rest.
"""

from __future__ import annotations

import abc
import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from chunk_cache.errors import ChunkCacheError
from chunk_cache.layouts.base import LayerKV
from rag_kernels import Registry

if TYPE_CHECKING:
    from chunk_cache.records import ChunkKV

LOSSLESS = "plain"
"""The codec that every record can be written with."""


class CodecError(ChunkCacheError):
    """A layer that a codec cannot store: not finite, or not ``[T, H, D]`` of a floating dtype."""


class Codec(abc.ABC):
    """One layer of a record as tensors to be written, and back.

    Tiers below memory store what :meth:`encode` returns; memory holds KV as the model computed it. A file names its
    codec, so it is read whatever the setting of the reader is, and the name never changes its meaning.

    **What a lossy codec promises.** Decoded values are finite, of the dtype they had, and each within the bound that the
    codec states. Encoding what was decoded, and decoding it again, changes nothing more. KV that went through it is
    approximate for ever: :attr:`ChunkKV.codec <chunk_cache.ChunkKV.codec>` says so, and such KV is never taken for
    what plain prefill computes.

    An instance has no state and serves every thread.
    """

    name: ClassVar[str]
    """As in the files and in :data:`CODECS`."""
    is_lossless: ClassVar[bool] = False
    """Whether :meth:`decode` gives back every bit."""

    @abc.abstractmethod
    def encode(self, layer: LayerKV) -> dict[str, Tensor]:
        """Turn one layer into the tensors that are stored.

        Parameters
        ----------
        layer : LayerKV
            ``k`` ``[T, H, D]`` and ``v`` ``[T, H, D_v]`` of one floating dtype, any device; only read.

        Returns
        -------
        dict of str to Tensor
            Contiguous, on the layer's device; some may be empty. May share memory with `layer`.

        Raises
        ------
        CodecError
            If it cannot store this layer within its bound.
        """

    @abc.abstractmethod
    def decode(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> LayerKV:
        """Turn stored tensors back into a layer.

        Parameters
        ----------
        tensors : mapping of str to Tensor
            What :meth:`encode` returned; only read.
        dtype : dtype
            The record's.

        Returns
        -------
        LayerKV
            Contiguous, of `dtype`, on the device of `tensors`.

        Raises
        ------
        CodecError
            If the tensors are not what this codec writes.
        """


CODECS: Registry[type[Codec]] = Registry(
    "KV codec",
    "rag_pipeline.codecs",
    {
        "plain": "chunk_cache.codecs.plain:PlainCodec",
        "fp8": "chunk_cache.codecs.fp8:Fp8Codec",
        "kivi8": "chunk_cache.codecs.kivi8:Kivi8Codec",
        "kivi4": "chunk_cache.codecs.kivi4:Kivi4Codec",
    },
    base=Codec,
)
"""Codecs by name, as the setting ``fusion.store_codec`` and the files name them."""


def codec_named(name: str) -> Codec:
    """Return a codec.

    Raises
    ------
    ChunkCacheError
        For a name that is not known.
    """
    try:
        return _instance(CODECS.get(name))
    except ValueError as error:
        raise ChunkCacheError(str(error)) from None


def encode_layers(record: ChunkKV, wanted: str) -> tuple[str, list[dict[str, Tensor]]]:
    """Encode every layer of a record, with the codec that it must be written with.

    That is the one that is wanted, but for three cases. A record with side tensors is a link of a chain: it is written
    lossless, or every further link would add an error. KV that went through a lossy codec keeps that codec: another
    name in a file would hide the loss, or add a second one. KV that the wanted codec cannot store is written lossless.

    Parameters
    ----------
    record : ChunkKV
        Any device; only read.
    wanted : str
        Name in :data:`CODECS`.

    Returns
    -------
    str
        Name of the codec that was used: what the file must say.
    list of dict
        The tensors of each layer, see :meth:`Codec.encode`.

    Raises
    ------
    ChunkCacheError
        For an unknown name, or approximate KV that its own codec refuses.
    """
    name = (LOSSLESS if record.side else wanted) if record.is_lossless else record.codec
    layers = range(record.num_layers)
    try:
        return name, [codec_named(name).encode(record.layer(index)) for index in layers]
    except CodecError:
        if not record.is_lossless:
            raise
    return LOSSLESS, [codec_named(LOSSLESS).encode(record.layer(index)) for index in layers]


def check_layer(layer: LayerKV) -> None:
    """Check that a lossy codec can store a layer.

    Raises
    ------
    CodecError
        It is not ``[T, H, D]`` of a floating dtype, or holds infinities, NaN, or values so large that the distance
        between two of them is none.
    """
    for name, tensor in zip(LayerKV._fields, layer, strict=True):
        if tensor.ndim != 3 or tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise CodecError(
                f"{name} of shape {list(tensor.shape)}, {tensor.dtype}: "
                "give [tokens, heads, size] of float32, float16 or bfloat16"
            )
        # Half of float32's largest value: differences are computed in float32.
        if tensor.numel() and not bool(tensor.abs().amax() <= torch.finfo(torch.float32).max / 2):
            raise CodecError(
                f"{name} holds infinities, NaN or values beyond 1.7e38: store it plain"
            )


def stored(tensors: Mapping[str, Tensor], *names: str) -> tuple[Tensor, ...]:
    """Tensors by name, in this order.

    Raises
    ------
    CodecError
        If any other names are there, or one is missing.
    """
    if tensors.keys() != set(names):
        raise CodecError(f"stored tensors are {sorted(tensors)}: expected {sorted(names)}")
    return tuple(tensors[name] for name in names)


@functools.cache
def _instance(codec: type[Codec]) -> Codec:
    return codec()
