"""Keys and queries without their mean, which is most of what 4 bits would be spent on.

Shape suffixes: N key/value heads, K keys, D head dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor


def smooth_keys(k_NKD: Tensor, num_frozen: int) -> tuple[Tensor, Tensor]:
    """Take a constant vector from every key of a head; exact for the softmax, whatever the vector is.

    Every logit of a row changes by the same ``q . mean``. The mean is that of the first keys only, so that it is the
    same one in every piece of a prompt.

    Parameters
    ----------
    k_NKD : Tensor
        Floating point ``[N, K, D]``, keys of a request by position.
    num_frozen : int
        Keys that the mean is taken over; at least 1.

    Returns
    -------
    tuple of Tensor
        Smoothed keys ``[N, K, D]`` and the mean ``[N, 1, D]``.
    """
    mean = mean_of_tokens(k_NKD[:, :num_frozen])
    return k_NKD - mean, mean


def smooth_queries(q: Tensor, counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Take the mean over the rows from queries: ``q . k == q' . k + mean . k`` for every key.

    A block at the end of a piece has fewer rows than its neighbours, and has them alone or beside those; the mean is
    that of its own rows either way.

    Parameters
    ----------
    q : Tensor
        Floating point ``[..., R, D]``: rows of one block.
    counts : Tensor, optional
        Integer ``[...]``: the first rows that count, at least 1; all by default.

    Returns
    -------
    tuple of Tensor
        Smoothed queries ``[..., R, D]`` and the mean ``[..., 1, D]``.
    """
    if counts is None:
        mean = mean_of_tokens(q)
    else:
        is_row = torch.arange(q.shape[-2], device=q.device) < counts[..., None]
        total = (q.double() * is_row[..., None]).sum(dim=-2, keepdim=True)
        mean = (total / counts[..., None, None]).to(q.dtype)
    return q - mean, mean


def mean_of_tokens(x: Tensor) -> Tensor:
    """Mean ``[..., 1, D]`` of ``[..., T, D]``, added up in fp64: the same number in whatever order that is done."""
    return x.mean(dim=-2, keepdim=True, dtype=torch.float64).to(x.dtype)
