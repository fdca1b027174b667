"""Chunk KV into and out of a paged pool.

Shape suffixes: T tokens, N key/value heads, H head dimension. A pool is ``[num_slots, N, H]``, one slot per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rag_kernels.rotary import RotarySpec, RotationTable, rerotate_keys


def gather_kv(pool: Tensor, slots: Tensor) -> Tensor:
    """Rows of a pool in the order of ``slots``.

    Parameters
    ----------
    pool : Tensor
        ``[num_slots, N, H]``.
    slots : Tensor
        Integer ``[T]`` on the pool's device.

    Returns
    -------
    Tensor
        ``[T, N, H]``, a copy.
    """
    return pool.index_select(0, slots)


def scatter_kv_inplace(pool: Tensor, slots: Tensor, rows: Tensor) -> None:
    """Write rows into a pool; the inverse of :func:`gather_kv`.

    Parameters
    ----------
    pool : Tensor
        ``[num_slots, N, H]``.
    slots : Tensor
        Integer ``[T]`` on the pool's device, all different.
    rows : Tensor
        ``[T, N, H]``; rounded once to the pool's type.
    """
    slots = slots.long()
    rows = rows.to(pool.dtype)
    row_bytes = pool[0].numel() * pool.element_size() if pool.shape[0] else 0
    if (
        pool.device.type == "cpu"
        and pool.element_size() == 2
        and row_bytes % 8 == 0
        and pool.is_contiguous()
    ):
        # Scattering is bound by elements, not bytes: 8 bytes at a time takes half the time of 2.
        pool.flatten(1).view(torch.int64)[slots] = rows.contiguous().flatten(1).view(torch.int64)
        return
    pool.index_copy_(0, slots, rows)


def load_chunk_inplace(
    k_pool: Tensor,
    v_pool: Tensor,
    slots: Tensor,
    k_src: Tensor,
    v_src: Tensor,
    delta: int | Tensor | RotationTable,
    spec: RotarySpec,
) -> None:
    """Write a chunk's keys, rotated to their new positions, and values into the pool.

    Parameters
    ----------
    k_pool, v_pool : Tensor
        ``[num_slots, N, H]``; written at ``slots`` only.
    slots : Tensor
        Integer ``[T]`` on the pool's device, all different.
    k_src, v_src : Tensor
        ``[T, N, H]`` as stored: keys carry the rotation of the position they were computed at. Any floating
        type; each value is rounded once to the pool's type.
    delta : int, Tensor or RotationTable
        New position minus old, see :func:`rerotate_keys`.
    spec : RotarySpec
        The model's rotation.
    """
    if k_src.shape[0] != slots.shape[0] or v_src.shape[0] != slots.shape[0]:
        raise ValueError(
            f"{slots.shape[0]} slots for {k_src.shape[0]} keys and {v_src.shape[0]} values; the counts must agree."
        )
    table = delta if isinstance(delta, RotationTable) else spec.table(delta, k_pool.device)
    k = k_src.to(k_pool.device, non_blocking=True)
    if k_pool.device.type == "cuda":
        from rag_kernels.load_triton import load_chunk_triton

        v = v_src.to(v_pool.device, non_blocking=True)
        load_chunk_triton(k_pool, v_pool, slots, k.contiguous(), v.contiguous(), table, spec)
        return
    if not table.is_zero:
        k = rerotate_keys(k, table, spec, out=k.new_empty(k.shape, dtype=k_pool.dtype))
    scatter_kv_inplace(k_pool, slots, k)
    scatter_kv_inplace(v_pool, slots, v_src.to(v_pool.device, non_blocking=True))
