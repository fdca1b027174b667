"""Chunk KV out of the paged pool: the slots of one chunk, copied layer by layer into a record."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from chunk_cache import ChunkKV, KVLayout
from rag_pipeline.sglang_plugin.fusion.request.holdings import Capture


def capture_chunk(
    layout: KVLayout, pool: Any, num_layers: int, kv_slots: Tensor, capture: Capture
) -> ChunkKV:
    """Copy one chunk.

    Parameters
    ----------
    layout : KVLayout
        Of the pool.
    pool : object
        The paged pool after the forward that completed the chunk.
    num_layers : int
        Layers to copy.
    kv_slots : Tensor
        int64 ``[>= capture.end]``; slot ``j`` holds position ``j`` of the request.
    capture : Capture
        Which positions, and the key.

    Returns
    -------
    ChunkKV
        Keys as they lie in the pool, rotated for their position, so that a load rounds once.
    """
    slots = kv_slots[capture.start : capture.end]
    k, v = layout.gather(pool, num_layers, slots)
    return ChunkKV(
        key=capture.build.key,
        token_ids=capture.build.token_ids,
        base_position=capture.base_position,
        k=k,
        v=v,
        layout=layout.name,
    )
