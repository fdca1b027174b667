"""The header of a stored record: what it is, where its layers lie, and every checksum; see :mod:`chunk_cache.tiers.encoding`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import xxhash

from chunk_cache.codecs.base import codec_named
from chunk_cache.errors import ChunkCacheError, DamagedRecordError
from chunk_cache.keys import STORE_FORMAT_VERSION, ChunkKey, TokenIds, as_token_ids
from chunk_cache.layouts.base import layout_named
from chunk_cache.side_tensors import read_side

STORE_FORMAT = "rag-chunk-store"
"""Name of the format, in every record."""
Buffer = bytes | bytearray | memoryview
"""Bytes of a record or of a part of it."""

_PREFIX = b'{"__metadata__":{"checksum":"'
"""The JSON begins so: the header's checksum stands at one place, and covers all but itself."""
_CHECKSUM_AT = 8 + len(_PREFIX)
_CHECKSUM_LENGTH = 32
_MOST_JSON_BYTES = 128 << 20
"""Side tensors stand there too. A length beyond this is damage; nobody allocates what a flipped bit asks for."""

DTYPE_NAMES = {
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
"""As safetensors names them."""
_DTYPE_OF = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor of a layer lies in the whole record."""

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
    checksums: tuple[str, ...] = field(repr=False)
    """Of the layers."""
    tensors: tuple[tuple[StoredTensor, ...], ...] = field(repr=False)
    """Of each layer."""
    side: Mapping[str, torch.Tensor] = field(default_factory=dict, repr=False)
    """Side tensors of the record; empty for most."""

    @property
    def num_layers(self) -> int:
        """Number of layers L."""
        return len(self.tensors)

    @property
    def num_tokens(self) -> int:
        """Number of tokens T."""
        return int(self.token_ids.size)

    @property
    def can_decode(self) -> bool:
        """Whether this process knows the layout and the codec; what another release wrote may lack them."""
        try:
            layout_named(self.layout)
            codec_named(self.codec)
        except ChunkCacheError:
            return False
        return True

    def layer_range(self, index: int) -> tuple[int, int]:
        """Where a layer's bytes lie in the whole record, ``[start, end)``."""
        return self.tensors[index][0].start, self.tensors[index][-1].end


def write_header(metadata: Mapping[str, str], tensors: Mapping[str, Any], ids: bytes) -> bytes:
    """Write a header.

    Parameters
    ----------
    metadata : mapping
        Everything but format, version and the header's checksum.
    tensors : mapping
        ``dtype``, ``shape`` and ``data_offsets`` by name, as safetensors has them.
    ids : bytes
        The first tensor.
    """
    first = {
        "checksum": "0" * _CHECKSUM_LENGTH,
        "format": STORE_FORMAT,
        "version": str(STORE_FORMAT_VERSION),
    }
    everything = {"__metadata__": {**first, **metadata}, **tensors}
    text = json.dumps(everything, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = bytearray(len(text).to_bytes(8, "little") + text + ids)
    header[_CHECKSUM_AT : _CHECKSUM_AT + _CHECKSUM_LENGTH] = _header_checksum(header).encode()
    return bytes(header)


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
        if (told["format"], told["version"], identity) != (
            STORE_FORMAT,
            str(STORE_FORMAT_VERSION),
            key,
        ):
            return None
        if ChunkKey.of(key.namespace, ids) != key:
            return None
        return _describe(key, ids, told, entries, start)
    except Exception:
        # Deliberately wide: whatever damaged bytes make the parsers raise, they are a miss.
        return None


def _describe(
    key: ChunkKey,
    ids: TokenIds,
    told: Mapping[str, str],
    entries: dict[str, Any],
    ids_start: int,
) -> RecordHeader:
    """Read a header whose checksum is right; raises anything where it contradicts itself."""
    del entries["token_ids"]
    layers: list[list[StoredTensor]] = []
    at = end = ids_start + ids.nbytes
    for name, entry in entries.items():
        _, index, short = name.split(".", 2)
        start, end = (ids_start + offset for offset in entry["data_offsets"])
        if start != at or int(index) not in (len(layers) - 1, len(layers)):
            raise DamagedRecordError(f"chunk {key}: tensor {name} is out of order")
        if int(index) == len(layers):
            layers.append([])
        dtype = _DTYPE_OF[entry["dtype"]]
        layers[-1].append(StoredTensor(short, dtype, tuple(entry["shape"]), start, end))
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
        checksums=checksums,
        tensors=tuple(map(tuple, layers)),
        side=read_side(told["side"]) if "side" in told else {},
    )


def _header_checksum(header: Buffer) -> str:
    view = memoryview(header)
    digest = xxhash.xxh3_128(view[:_CHECKSUM_AT])
    digest.update(view[_CHECKSUM_AT + _CHECKSUM_LENGTH :])
    return digest.hexdigest()


def checksum(*parts: Buffer) -> str:
    """XXH3-128 of bytes that follow each other, 32 hex digits."""
    digest = xxhash.xxh3_128()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
