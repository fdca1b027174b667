"""Rows into and out of a paged pool.

Shape suffixes: T tokens, N key/value heads, H head dimension. A pool is ``[num_slots, N, H]``, one slot per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WIDE = (torch.complex128, torch.int64)
"""Types of 16 and 8 bytes that rows are copied as."""


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
    if pool.device.type == "cpu" and pool.is_contiguous() and pool.shape[0]:
        rows = rows.contiguous()
        # Scattering is bound by elements, not bytes: 16 bytes at a time take half the time of 8, a fifth of that of 2.
        for wide in _WIDE:
            if _fits(pool, wide) and _fits(rows, wide):
                pool.flatten(1).view(wide)[slots] = rows.flatten(1).view(wide)
                return
    pool.index_copy_(0, slots, rows)


def _fits(rows: Tensor, wide: torch.dtype) -> bool:
    """Whether rows can be seen as elements of a wider type: whole ones, and aligned, as its instructions demand."""
    row_bytes = rows.element_size() * rows.shape[1:].numel()
    return row_bytes % wide.itemsize == 0 and rows.data_ptr() % wide.itemsize == 0
