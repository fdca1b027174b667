"""Which blocks a block of rows keeps: those with a key that weighs enough against the sink and the neighbourhood.

The relative attention score of a key ``j`` for a row ``i`` is ``exp(scale s_ij) / Z_i``, where ``Z_i`` adds up
``exp(scale s_it)`` over the first keys and those shortly before the row, in full precision. It is never smaller than
the true softmax weight, so what is left out below ``tau`` weighs at most ``tau``. A block is kept if any of its keys
is above ``tau`` for any of the rows. No exponential is needed per key: that is the same as
``s_ij > m_i + log2(Z_i tau) / (scale log2 e)`` with the largest logit ``m_i`` taken out of ``Z_i``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

DENSE_TAU = 1e-5
"""A head with a smaller threshold reads everything."""
LARGEST_TAU = 1e30
"""What larger ones count as; a head with an infinite one reads sink and neighbourhood alone."""


def row_thresholds(logits: Tensor, tau: Tensor, scale: float) -> Tensor:
    """Logit above which a key is kept.

    Parameters
    ----------
    logits : Tensor
        fp32 ``[..., T]``: ``q . k`` of a row with its reference keys, ``-inf`` for those that it may not read.
    tau : Tensor
        fp32, broadcast against ``[...]``; above 0 and finite.
    scale : float
        Of the softmax.

    Returns
    -------
    Tensor
        fp32 ``[...]``, in units of ``q . k``.
    """
    scale_log2 = scale * math.log2(math.e)
    largest = logits.amax(dim=-1)
    mass = torch.exp2((logits - largest[..., None]).mul_(scale_log2)).sum(dim=-1)
    return largest + torch.log2(mass * tau) / scale_log2


def kept_blocks(excess: Tensor, key_block: int) -> Tensor:
    """Blocks with a key above the threshold.

    Parameters
    ----------
    excess : Tensor
        ``[..., K]`` from :func:`~rag_kernels.sparse.sale.estimate.largest_excess`; ``K`` whole blocks.
    key_block : int
        Keys of a block.

    Returns
    -------
    Tensor
        bool ``[..., K / key_block]``.
    """
    return excess.unflatten(-1, (-1, key_block)).amax(dim=-1) > 0
