"""A record as bytes, format 2: the same in a file, in a remote store and on a wire; single layers can be read.

One record is one valid safetensors file::

    8 bytes     length of the JSON, little-endian
    JSON        __metadata__ (see below), then the tensors by name; padded with spaces
    token_ids   int32 [T]
    layer 0     its tensors, as its codec made them; then layer 1, and so on

What stands before layer 0 is the *header*. The metadata names the format, the whole identity of the record (key, base
position, layout, codec, dtype, shapes), the record's side tensors if it has some, and one XXH3-128 checksum per layer; its own checksum covers every other byte of
the header. So there is no byte that may change unseen. The checksums find damage, not forgery: whoever may write to a
store may write any record. XXH3-128 reads 25 GB/s where BLAKE2b reads 0.9 (one core of a Xeon), and a layer is
checked each time it is loaded. The library's own writer is not used, because it orders tensors by dtype.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from chunk_cache.codecs.base import codec_named, encode_layers
from chunk_cache.errors import ChunkCacheError, DamagedRecordError
from chunk_cache.keys import ChunkKey
from chunk_cache.layouts.base import LayerKV
from chunk_cache.records import ChunkKV
from chunk_cache.side_tensors import write_side
from chunk_cache.tiers.record_header import (
    DTYPE_NAMES,
    STORE_FORMAT,
    Buffer,
    RecordHeader,
    checksum,
    header_size,
    read_header,
    write_header,
)

__all__ = [
    "STORE_FORMAT",
    "Buffer",
    "DamagedRecordError",
    "EncodedRecord",
    "RecordHeader",
    "assemble_record",
    "check_layer",
    "decode_layer",
    "decode_record",
    "encode_record",
    "header_size",
    "read_header",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedRecord:
    """A record as :func:`encode_record` made it: the header and the layers, one after another, are the whole.

    Attributes
    ----------
    header : bytes
        What stands before layer 0.
    pieces : list of list of memoryview
        The tensors of each layer. What a codec stores as it is lies in the record's own memory: nothing was copied, and
        the record must not change as long as these are read.
    """

    header: bytes
    pieces: list[list[memoryview]]

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole record."""
        return sum(map(len, self.parts))

    @property
    def parts(self) -> list[Buffer]:
        """All bytes in order, in pieces."""
        return [self.header, *itertools.chain.from_iterable(self.pieces)]

    @property
    def layers(self) -> list[bytes]:
        """Each layer in one piece: a copy, made when it is asked for."""
        return [b"".join(pieces) for pieces in self.pieces]


def encode_record(record: ChunkKV, codec: str = "plain") -> EncodedRecord:
    """Write a record as bytes.

    Parameters
    ----------
    record : ChunkKV
        On any device; only read.
    codec : str
        Name of the codec that its layers are wanted in; the header tells the one that was used.

    Raises
    ------
    DamagedRecordError
        If the record was sealed and has changed since: no copy of it is made.
    ChunkCacheError
        For a codec that is not known.
    """
    if record.checksum is not None and not record.verify():
        raise DamagedRecordError(f"chunk {record.key} changed in memory since it was sealed")
    used, tensors_of = encode_layers(record, codec)
    ids = record.token_ids.astype("<i4", copy=False).tobytes()
    tensors: dict[str, dict[str, Any]] = {
        "token_ids": _entry("I32", [record.num_tokens], 0, len(ids))
    }
    layers, at = [], len(ids)
    for index, encoded in enumerate(tensors_of):
        parts = []
        for name, tensor in _in_order(encoded):
            data = _bytes_of(tensor)
            tensors[f"layer.{index}.{name}"] = _entry(
                DTYPE_NAMES[tensor.dtype], list(tensor.shape), at, len(data)
            )
            at += len(data)
            parts.append(data)
        layers.append(parts)
    metadata = {
        "namespace": record.key.namespace,
        "digest": record.key.digest,
        "num_tokens": str(record.key.num_tokens),
        "base_position": str(record.base_position),
        "layout": record.layout,
        "codec": used,
        "dtype": DTYPE_NAMES[record.k.dtype],
        "k_shape": json.dumps(list(record.k.shape[1:])),
        "v_shape": json.dumps(list(record.v.shape[1:])),
        "layer_checksums": " ".join(checksum(*layer) for layer in layers),
        **({"side": write_side(record.side)} if record.side else {}),
    }
    return EncodedRecord(header=write_header(metadata, tensors, ids), pieces=layers)


def check_layer(header: RecordHeader, index: int, *data: Buffer) -> None:
    """Compare the bytes of :meth:`RecordHeader.layer_range`, in one piece or more, with the layer's checksum.

    Raises
    ------
    DamagedRecordError
        Unless they are what was written.
    """
    start, end = header.layer_range(index)
    if sum(map(len, data)) != end - start or checksum(*data) != header.checksums[index]:
        raise DamagedRecordError(f"chunk {header.key}: layer {index} is damaged")


def decode_layer(header: RecordHeader, index: int, data: Buffer) -> LayerKV:
    """Decode one layer.

    Parameters
    ----------
    header : RecordHeader
        Of the record.
    index : int
        Number of the layer.
    data : bytes-like
        The bytes of :meth:`RecordHeader.layer_range`. The result may share their memory; bytes that cannot be
        written to are copied, as PyTorch has no read-only tensors.

    Returns
    -------
    LayerKV
        On the CPU, all tokens.

    Raises
    ------
    DamagedRecordError
        Unless the bytes are what was written.
    ChunkCacheError
        For a codec that is not known.
    """
    check_layer(header, index, data)
    start = header.layer_range(index)[0]
    whole = _as_tensor(data)
    stored = {
        one.name: whole[one.start - start : one.end - start].view(one.dtype).view(one.shape)
        for one in header.tensors[index]
    }
    layer: LayerKV = codec_named(header.codec).decode(stored, header.dtype)
    for tensor, shape in ((layer.k, header.k_shape), (layer.v, header.v_shape)):
        if tuple(tensor.shape) != shape or tensor.dtype != header.dtype:
            raise DamagedRecordError(
                f"chunk {header.key}: layer {index} decodes to {list(tensor.shape)} {tensor.dtype}"
            )
    return layer


def decode_record(key: ChunkKey, data: Buffer) -> ChunkKV | None:
    """Decode a whole record.

    Returns
    -------
    ChunkKV or None
        On the CPU; ``None`` for anything that is not, byte for byte, a record of this key that can be decoded here.
    """
    header = read_header(key, data)
    if header is None or len(data) != header.num_bytes:
        return None
    view = memoryview(data)
    try:
        return assemble_record(
            header,
            (
                decode_layer(header, index, view[slice(*header.layer_range(index))])
                for index in range(header.num_layers)
            ),
        )
    except ChunkCacheError:
        return None


def assemble_record(header: RecordHeader, layers: Iterable[LayerKV]) -> ChunkKV:
    """Make a record of a header and all of its decoded layers, in order; raises what they raise."""
    k = torch.empty((header.num_layers, *header.k_shape), dtype=header.dtype)
    v = torch.empty((header.num_layers, *header.v_shape), dtype=header.dtype)
    for index, layer in enumerate(layers):
        k[index], v[index] = layer
    return ChunkKV(
        key=header.key,
        token_ids=header.token_ids,
        base_position=header.base_position,
        k=k,
        v=v,
        layout=header.layout,
        codec=header.codec,
        side=header.side,
    )


def _entry(dtype: str, shape: list[int], start: int, length: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, start + length]}


def _in_order(tensors: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    """The widest elements first: each tensor then lies aligned in a layer that does."""
    return sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))


def _bytes_of(tensor: Tensor) -> memoryview:
    """The tensor's own memory where it lies on the host in one piece."""
    flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    data: memoryview = flat.numpy().data
    return data


def _as_tensor(data: Buffer) -> Tensor:
    """uint8 ``[n]`` over the bytes."""
    if not len(data):
        return torch.empty(0, dtype=torch.uint8)
    writable = data if not memoryview(data).readonly else bytearray(data)
    return torch.frombuffer(writable, dtype=torch.uint8)
