"""A record as bytes, format 2: the same in a file, in a remote store and on a wire; single layers can be read.

One record is one valid safetensors file::

    8 bytes     length of the JSON, little-endian
    JSON        __metadata__ (see below), then the tensors by name; padded with spaces
    token_ids   int32 [T]
    layer 0     its tensors, as its codec made them; then layer 1, and so on

What stands before layer 0 is the *header*. The metadata names the format, the whole identity of the record (key, base
position, layout, codec, dtype, shapes) and one XXH3-128 checksum per layer; its own checksum covers every other byte of
the header. So there is no byte that may change unseen. The checksums find damage, not forgery: whoever may write to a
store may write any record. XXH3-128 reads 25 GB/s where BLAKE2b reads 0.9 (one core of a Xeon), and a layer is
checked each time it is loaded. The library's own writer is not used, because it orders tensors by dtype.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from chunk_cache.errors import ChunkCacheError
from chunk_cache.keys import ChunkKey, TokenIds, as_token_ids
from chunk_cache.layouts.base import LayerKV, layout_named
from chunk_cache.records import ChunkKV

STORE_FORMAT = "rag-chunk-store"
"""Name of the format, in every record."""
RECORD_VERSION = "2"
"""Version of the format, in every record; one that says another is a miss."""

Buffer = bytes | bytearray | memoryview
"""Bytes of a record or of a part of it."""

_PREFIX = b'{"__metadata__":{"checksum":"'
"""The JSON begins so: the header's checksum stands at one place, and covers all but itself."""
_CHECKSUM_AT = 8 + len(_PREFIX)
_CHECKSUM_LENGTH = 32
_MOST_JSON_BYTES = 16 << 20
"""A length beyond this is damage; nobody allocates what a flipped bit asks for."""

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Names of safetensors."""
_DTYPE_OF = {name: dtype for dtype, name in _DTYPES.items()}


class DamagedRecordError(ChunkCacheError):
    """Stored bytes are not what was written; the record is a miss."""


class _Plain:
    """Keys and values as they are."""

    def encode(self, layer: LayerKV) -> dict[str, Tensor]:
        return {"k": layer.k, "v": layer.v}

    def decode(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> LayerKV:
        return LayerKV(tensors["k"], tensors["v"])


def _codec(name: str) -> Any:
    if name != "plain":
        raise ChunkCacheError(f"codec {name!r} is not implemented: allowed is 'plain'")
    return _Plain()


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedRecord:
    """A record as :func:`encode_record` made it: the header and the layers, one after another, are the whole."""

    header: bytes
    layers: list[bytes]

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole record."""
        return len(self.header) + sum(map(len, self.layers))

    @property
    def parts(self) -> list[bytes]:
        """All bytes in order, in pieces."""
        return [self.header, *self.layers]


@dataclass(frozen=True, slots=True)
class _StoredTensor:
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordHeader:
    """What the header of a record says, verified: everything but the KV."""

    key: ChunkKey
    token_ids: TokenIds = field(repr=False)
    base_position: int
    layout: str
    codec: str
    dtype: torch.dtype
    """Of the decoded tensors."""
    k_shape: tuple[int, ...]
    """Of one decoded layer."""
    v_shape: tuple[int, ...]
    header_bytes: int
    num_bytes: int
    """Of the whole record."""
    _checksums: tuple[str, ...] = field(repr=False)
    _tensors: tuple[tuple[_StoredTensor, ...], ...] = field(repr=False)

    @property
    def num_layers(self) -> int:
        """Number of layers L."""
        return len(self._tensors)

    @property
    def num_tokens(self) -> int:
        """Number of tokens T."""
        return int(self.token_ids.size)

    @property
    def can_decode(self) -> bool:
        """Whether this process knows the layout and the codec; what another release wrote may lack them."""
        try:
            layout_named(self.layout)
            _codec(self.codec)
        except ChunkCacheError:
            return False
        return True

    def layer_range(self, index: int) -> tuple[int, int]:
        """Where a layer's bytes lie in the whole record, ``[start, end)``."""
        return self._tensors[index][0].start, self._tensors[index][-1].end


def encode_record(record: ChunkKV, codec: str = "plain") -> EncodedRecord:
    """Write a record as bytes.

    Parameters
    ----------
    record : ChunkKV
        On any device; only read.
    codec : str
        Name of the codec of its layers.

    Raises
    ------
    DamagedRecordError
        If the record was sealed and has changed since: no copy of it is made.
    ChunkCacheError
        For a codec that is not known.
    """
    if record.checksum is not None and not record.verify():
        raise DamagedRecordError(f"chunk {record.key} changed in memory since it was sealed")
    coder = _codec(codec)
    ids = record.token_ids.astype("<i4", copy=False).tobytes()
    tensors: dict[str, dict[str, Any]] = {
        "token_ids": _entry("I32", [record.num_tokens], 0, len(ids))
    }
    layers, at = [], len(ids)
    for index in range(record.num_layers):
        parts = []
        for name, tensor in _in_order(coder.encode(record.layer(index))):
            data = _bytes_of(tensor)
            tensors[f"layer.{index}.{name}"] = _entry(
                _DTYPES[tensor.dtype], list(tensor.shape), at, len(data)
            )
            at += len(data)
            parts.append(data)
        layers.append(b"".join(parts))
    metadata = {
        "format": STORE_FORMAT,
        "version": RECORD_VERSION,
        "namespace": record.key.namespace,
        "digest": record.key.digest,
        "num_tokens": str(record.key.num_tokens),
        "base_position": str(record.base_position),
        "layout": record.layout,
        "codec": codec,
        "dtype": _DTYPES[record.k.dtype],
        "k_shape": json.dumps(list(record.k.shape[1:])),
        "v_shape": json.dumps(list(record.v.shape[1:])),
        "layer_checksums": " ".join(_checksum(layer) for layer in layers),
    }
    return EncodedRecord(header=_write_header(metadata, tensors, ids), layers=layers)


def header_size(key: ChunkKey, first: Buffer) -> int:
    """Bytes of a record's header, of which the first 8 are given; whether they are right shows in its checksum.

    Raises
    ------
    DamagedRecordError
        If they cannot be right.
    """
    length = int.from_bytes(first[:8], "little")
    if len(first) < 8 or length > _MOST_JSON_BYTES:
        raise DamagedRecordError(f"chunk {key}: its header does not begin as one")
    return 8 + length + 4 * key.num_tokens


def read_header(key: ChunkKey, data: Buffer) -> RecordHeader | None:
    """Read the header of what should be the record of a key.

    Parameters
    ----------
    key : ChunkKey
        Which record is expected.
    data : bytes-like
        The record from its beginning, :func:`header_size` bytes or more.

    Returns
    -------
    RecordHeader or None
        ``None`` unless every byte of the header is what was written for this key, in this version.
    """
    try:
        header = bytes(data[: header_size(key, data)])
        start = len(header) - 4 * key.num_tokens
        found = header[_CHECKSUM_AT : _CHECKSUM_AT + _CHECKSUM_LENGTH].decode("ascii")
        if not header.startswith(_PREFIX, 8) or _header_checksum(header) != found:
            return None
        entries = json.loads(header[8:start])
        told = entries.pop("__metadata__")
        identity = ChunkKey(told["namespace"], told["digest"], int(told["num_tokens"]))
        ids = as_token_ids(np.frombuffer(header, dtype="<i4", offset=start))
        if (told["format"], told["version"], identity) != (STORE_FORMAT, RECORD_VERSION, key):
            return None
        if ChunkKey.of(key.namespace, ids) != key:
            return None
        return _describe(key, ids, told, entries, start)
    except Exception:
        # Deliberately wide: whatever damaged bytes make the parsers raise, they are a miss.
        return None


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
    start, end = header.layer_range(index)
    if len(data) != end - start or _checksum(data) != header._checksums[index]:
        raise DamagedRecordError(f"chunk {header.key}: layer {index} is damaged")
    whole = _as_tensor(data)
    stored = {
        one.name: whole[one.start - start : one.end - start].view(one.dtype).view(one.shape)
        for one in header._tensors[index]
    }
    layer: LayerKV = _codec(header.codec).decode(stored, header.dtype)
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
            [
                decode_layer(header, index, view[slice(*header.layer_range(index))])
                for index in range(header.num_layers)
            ],
        )
    except ChunkCacheError:
        return None


def assemble_record(header: RecordHeader, layers: Sequence[LayerKV]) -> ChunkKV:
    """Make a record of a header and all of its decoded layers."""
    return ChunkKV(
        key=header.key,
        token_ids=header.token_ids,
        base_position=header.base_position,
        k=torch.stack([layer.k for layer in layers]),
        v=torch.stack([layer.v for layer in layers]),
        layout=header.layout,
    )


def _describe(
    key: ChunkKey,
    ids: TokenIds,
    told: Mapping[str, str],
    entries: dict[str, Any],
    ids_start: int,
) -> RecordHeader:
    """Read a header whose checksum is right; raises anything where it contradicts itself."""
    del entries["token_ids"]
    layers: list[list[_StoredTensor]] = []
    at = end = ids_start + ids.nbytes
    for name, entry in entries.items():
        _, index, short = name.split(".", 2)
        start, end = (ids_start + offset for offset in entry["data_offsets"])
        if start != at or int(index) not in (len(layers) - 1, len(layers)):
            raise DamagedRecordError(f"chunk {key}: tensor {name} is out of order")
        if int(index) == len(layers):
            layers.append([])
        dtype = _DTYPE_OF[entry["dtype"]]
        layers[-1].append(_StoredTensor(short, dtype, tuple(entry["shape"]), start, end))
        at = end
    checksums = tuple(told["layer_checksums"].split())
    if len(checksums) != len(layers):
        raise DamagedRecordError(f"chunk {key}: {len(checksums)} checksums, {len(layers)} layers")
    return RecordHeader(
        key=key,
        token_ids=ids,
        base_position=int(told["base_position"]),
        layout=told["layout"],
        codec=told["codec"],
        dtype=_DTYPE_OF[told["dtype"]],
        k_shape=tuple(json.loads(told["k_shape"])),
        v_shape=tuple(json.loads(told["v_shape"])),
        header_bytes=ids_start + ids.nbytes,
        num_bytes=end,
        _checksums=checksums,
        _tensors=tuple(map(tuple, layers)),
    )


def _write_header(metadata: Mapping[str, str], tensors: Mapping[str, Any], ids: bytes) -> bytes:
    first = {"checksum": "0" * _CHECKSUM_LENGTH}
    everything = {"__metadata__": {**first, **metadata}, **tensors}
    text = json.dumps(everything, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = bytearray(len(text).to_bytes(8, "little") + text + ids)
    header[_CHECKSUM_AT : _CHECKSUM_AT + _CHECKSUM_LENGTH] = _header_checksum(header).encode()
    return bytes(header)


def _header_checksum(header: Buffer) -> str:
    view = memoryview(header)
    digest = xxhash.xxh3_128(view[:_CHECKSUM_AT])
    digest.update(view[_CHECKSUM_AT + _CHECKSUM_LENGTH :])
    return digest.hexdigest()


def _checksum(data: Buffer) -> str:
    return xxhash.xxh3_128_hexdigest(data)


def _entry(dtype: str, shape: list[int], start: int, length: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, start + length]}


def _in_order(tensors: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    """The widest elements first: each tensor then lies aligned in a layer that does."""
    return sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))


def _bytes_of(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    data: bytes = flat.numpy().tobytes()
    return data


def _as_tensor(data: Buffer) -> Tensor:
    """uint8 ``[n]`` over the bytes."""
    if not len(data):
        return torch.empty(0, dtype=torch.uint8)
    writable = data if not memoryview(data).readonly else bytearray(data)
    return torch.frombuffer(writable, dtype=torch.uint8)
