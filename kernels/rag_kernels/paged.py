"""Chunk KV into and out of a paged pool.

Shape suffixes: T tokens, N key/value heads, H head dimension. A pool is ``[num_slots, N, H]``, one slot a token.
"""

from __future__ import annotations

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
        out = k.new_empty(k.shape, dtype=k_pool.dtype)
        k = rerotate_keys(k, table, spec, out=out)
    k_pool.index_copy_(0, slots.long(), k.to(k_pool.dtype))
    v_pool.index_copy_(0, slots.long(), v_src.to(v_pool.device, v_pool.dtype, non_blocking=True))
