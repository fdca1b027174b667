"""One chunk record as the bytes of a safetensors file, and back only if nothing of it changed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load, save

from chunk_cache.keys import ChunkKey, TokenIds, as_token_ids
from chunk_cache.records import ChunkKV

STORE_FORMAT = "rag-chunk-store"
"""Name of the format, in every chunk file and in the folder's manifest."""


def encode_record(record: ChunkKV) -> bytes:
    """Write a record (any device) as safetensors: ``k``, ``v``, ``token_ids`` and a checksum over all.

    Parameters
    ----------
    record : ChunkKV
        Sealed here if it is not.

    Returns
    -------
    bytes
        Layout, base position and checksum stand in the file's own header.
    """
    sealed = record if record.checksum is not None else record.sealed()
    header = {
        "format": STORE_FORMAT,
        "layout": record.layout,
        "codec": record.codec,
        "base_position": str(record.base_position),
        "checksum": str(sealed.checksum),
    }
    tensors = {
        "k": record.k.cpu(),
        "v": record.v.cpu(),
        "token_ids": torch.tensor(record.token_ids),
    }
    data: bytes = save(tensors, metadata=header)
    return data


def read_token_ids(path: Path) -> TokenIds | None:
    """Token ids of a chunk file, without its tensors; ``None`` where they cannot be read."""
    try:
        with path.open("rb") as file:
            header_size = int.from_bytes(file.read(8), "little")
            start, end = json.loads(file.read(header_size))["token_ids"]["data_offsets"]
            file.seek(8 + header_size + start)
            return as_token_ids(np.frombuffer(file.read(end - start), dtype="<i4"))
    except Exception:
        # As wide as below: a damaged file holds nothing that anybody can use.
        return None


def decode_record(key: ChunkKey, data: bytes) -> ChunkKV | None:
    """Read what :func:`encode_record` wrote for ``key``.

    Returns
    -------
    ChunkKV or None
        On the CPU; ``None`` for anything that is not, byte for byte, a record of this key.
    """
    try:
        header_size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + header_size])["__metadata__"]
        tensors = load(data)
        record = ChunkKV(
            key=key,
            token_ids=as_token_ids(tensors["token_ids"].numpy()),
            base_position=int(header["base_position"]),
            k=tensors["k"],
            v=tensors["v"],
            layout=str(header["layout"]),
            codec=str(header.get("codec", "plain")),
            checksum=header["checksum"],
        )
        return record if record.verify() else None
    except Exception:
        # Deliberately wide: whatever a damaged file makes the parsers raise, it is a miss.
        return None
