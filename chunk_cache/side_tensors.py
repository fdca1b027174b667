"""Side tensors of a record: small tensors beside K and V that say more of its tokens, and how a header holds them.

A record of a conversation's memory says by them which token each slot is, by what score it stayed, all text that its KV has
seen, and what it is called. They stand in the metadata of the header, as one text, so the header's checksum covers them.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from chunk_cache.errors import ChunkCacheError

SEEN_IDS = "seen_ids"
"""Name of the side tensor with the ids of all tokens that the KV was computed from, where those are more than the record's
own: int32, one dimension. What is erased is looked for in them."""

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.int32, torch.int64, torch.float16, torch.float32)
}


def freeze(side: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Check the side tensors of a record, and return what nobody can add to.

    Raises
    ------
    ChunkCacheError
        For a name that is no identifier, or a tensor that a header cannot hold.
    """
    for name, tensor in side.items():
        if not name.isidentifier():
            raise ChunkCacheError(f"side tensor {name!r:.80}: give an identifier as its name")
        if tensor.dtype not in _DTYPES.values() or tensor.device.type != "cpu":
            raise ChunkCacheError(
                f"side tensor {name!r} of {tensor.dtype} on {tensor.device}: give {', '.join(_DTYPES)} on the CPU"
            )
        if not tensor.is_contiguous():
            raise ChunkCacheError(f"side tensor {name!r} is not contiguous: copy it")
    return MappingProxyType({name: tensor.detach() for name, tensor in side.items()})


def write_side(side: Mapping[str, Tensor]) -> str:
    """Write side tensors as text."""
    return json.dumps(
        [
            [
                name,
                str(tensor.dtype).removeprefix("torch."),
                list(tensor.shape),
                base64.b64encode(tensor.numpy().tobytes()).decode("ascii"),
            ]
            for name, tensor in sorted(side.items())
        ],
        separators=(",", ":"),
    )


def read_side(text: str) -> Mapping[str, Tensor]:
    """Read what :func:`write_side` wrote; raises anything for other text."""
    side = {}
    for name, dtype, shape, data in json.loads(text):
        values = np.frombuffer(base64.b64decode(data, validate=True), dtype=dtype).copy()
        side[name] = torch.from_numpy(values.reshape(shape))
    return freeze(side)
