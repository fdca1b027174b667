"""Rows into and out of a paged pool.

Shape suffixes: T tokens, N key/value heads, H head dimension. A pool is ``[num_slots, N, H]``, one slot per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WIDE = ((torch.complex128, 16), (torch.int64, 8))
"""Types that rows are copied as, and their bytes."""


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
    if pool.device.type == "cpu" and rows.numel() and pool.is_contiguous():
        rows = rows.contiguous()
        # Scattering is bound by elements, not bytes: 16 bytes at a time take half the time of 8, a fifth of that of 2.
        # They must be aligned: the compiler's instructions demand it.
        places = rows.data_ptr() | pool.data_ptr() | (rows.nbytes // rows.shape[0])
        for wide, size in _WIDE:
            if places % size == 0:
                pool.flatten(1).view(wide)[slots] = rows.flatten(1).view(wide)
                return
    pool.index_copy_(0, slots, rows)
