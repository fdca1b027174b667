"""Chunk KV out of the paged pool: the slots of one chunk, copied layer by layer into a record."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from chunk_cache import ChunkKV
from rag_kernels import gather_kv
from rag_pipeline.sglang_plugin.fusion.request.holdings import Capture


def capture_chunk(pool: Any, num_layers: int, kv_slots: Tensor, capture: Capture) -> ChunkKV:
    """Copy one chunk.

    Parameters
    ----------
    pool : MHATokenToKVPool
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
    sample = pool.get_key_buffer(0)
    shape = (num_layers, int(slots.numel()), sample.shape[1], sample.shape[2])
    # Held in host memory: device memory belongs to the pool.
    k = torch.empty(shape, dtype=sample.dtype)
    v = torch.empty(shape, dtype=sample.dtype)
    for layer in range(num_layers):
        k[layer].copy_(gather_kv(pool.get_key_buffer(layer), slots))
        v[layer].copy_(gather_kv(pool.get_value_buffer(layer), slots))
    return ChunkKV(
        key=capture.build.key,
        token_ids=capture.build.token_ids,
        base_position=capture.base_position,
        k=k,
        v=v,
    )
