"""What a memory record is called, and what its tensors are.

A record is a :class:`~chunk_cache.ChunkKV` of M slots. Slot ``i`` of one head of one layer holds another token than
slot ``i`` of its neighbours. The keys are rotated for their true positions, as if nothing had been evicted, so that one
shift moves them all: ``base_position`` is the true position of the token that comes next, less M.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from chunk_cache import ChunkKV, KVContext, LoadingChunk, hash_token_ids
from rag_pipeline.protocol.memory_step import ID_DIGITS
from rag_pipeline.sglang_plugin.fusion.request.namespace import RadixNamespace
from rag_pipeline.sglang_plugin.fusion.runtime.model_facts import ModelFacts
from rag_pipeline.sglang_plugin.fusion.runtime.runtime import TokenArray

POSITIONS, SCORES = "positions", "scores"
"""Side tensors: int32 and fp16 ``[L, H, M]``, the true position of each slot's token, and by what it stayed."""

OWN_SPANS, OWN_FREE = "own_spans", "own_free"
"""Side tensors of a record whose own tokens stayed before others: int32 ``[S, 2]``, their spans of true positions, and
``[1]``, the slots that scores alone decided."""

NAME = "memory_id"
"""Side tensor: int32 ``[8]``, the memory id."""

_MARK = "memory:1:"
"""Begins the ``prefix_digest`` of every record's context; the number is raised when the meaning of a record changes."""


def context_of(
    facts: ModelFacts, name: str, prefix: TokenArray, tenant: RadixNamespace
) -> KVContext:
    """Context of the record of a memory id.

    Parameters
    ----------
    facts : ModelFacts
        The loaded model.
    name : str
        Memory id.
    prefix : ndarray
        Token ids in front of the slots. They are part of the id, but a client says that, so they stand here too.
    tenant : RadixNamespace
        Whose it is.
    """
    digest = f"{_MARK}{name}:{hash_token_ids(prefix)}"
    return facts.context(prefix_digest=digest, tenant=tenant.salt)


def id_of(prefix_digest: object) -> str | None:
    """Memory id that a context's ``prefix_digest`` names; None for what is no memory record."""
    if not isinstance(prefix_digest, str) or not prefix_digest.startswith(_MARK):
        return None
    name, _, _ = prefix_digest.removeprefix(_MARK).partition(":")
    return name if len(name) == ID_DIGITS else None


def name_tensor(name: str) -> Tensor:
    """A memory id as the side tensor :data:`NAME`."""
    return torch.from_numpy(np.frombuffer(bytes.fromhex(name), dtype="<i4").copy())


def name_of(record: ChunkKV) -> str | None:
    """Memory id of a record; None for what is no memory record."""
    name = record.side.get(NAME)
    return None if name is None else name.numpy().astype("<i4").tobytes().hex()


def is_memory(record: ChunkKV | LoadingChunk, facts: ModelFacts) -> bool:
    """Whether a record is one of this engine's layout and shape."""
    shape = (facts.num_layers, facts.num_kv_heads, record.num_tokens)
    positions, scores = record.side.get(POSITIONS), record.side.get(SCORES)
    return (
        record.layout == facts.layout.name
        and record.num_layers == facts.num_layers
        and positions is not None
        and scores is not None
        and (positions.shape, positions.dtype) == (shape, torch.int32)
        and (scores.shape, scores.dtype) == (shape, torch.float16)
        and _has_fit_own(record)
    )


def _has_fit_own(record: ChunkKV | LoadingChunk) -> bool:
    spans, free = record.side.get(OWN_SPANS), record.side.get(OWN_FREE)
    if spans is None or free is None:
        return spans is None and free is None
    return (
        (spans.ndim, spans.dtype) == (2, torch.int32)
        and spans.shape[1] == 2
        and (free.shape, free.dtype) == ((1,), torch.int32)
    )


def kept_shares(positions: Tensor, spans: tuple[tuple[int, int], ...]) -> list[float]:
    """Share of each span of true positions that is kept, over all layers and heads ``[L, H, M]``, rising along M."""
    edges = torch.tensor(spans, dtype=positions.dtype).reshape(-1)
    # The positions rise: two looks per span instead of one at each slot, while the scheduler waits.
    places = torch.searchsorted(positions, edges.expand(*positions.shape[:-1], -1).contiguous())
    counts = (places[..., 1::2] - places[..., ::2]).double().mean((0, 1))
    return [round(count / (b - a), 6) for count, (a, b) in zip(counts.tolist(), spans, strict=True)]
