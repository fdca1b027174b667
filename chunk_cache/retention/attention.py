"""Attention that rows of queries pay to keys, a few rows at a time: what several rules score by."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_CHUNK_BYTES = 2**20
"""Largest block of logits at once: it stays in a core's cache, so softmax and maximum read no memory."""


def attention_weights(
    keys: Tensor, queries: Tensor, first_hidden: Tensor | None = None
) -> Iterator[Tensor]:
    """Yield softmax over the given keys alone, in fp32.

    Parameters
    ----------
    keys : Tensor
        ``[n, H, D]``.
    queries : Tensor
        ``[R, Q, D]``, ``Q`` a multiple of ``H``; the query heads of a KV head are neighbours.
    first_hidden : Tensor, optional
        int ``[R]``: columns from here on are hidden from the row; every row sees at least one.

    Yields
    ------
    Tensor
        ``[H, r, G, n]`` for the next ``r`` rows, ``G = Q / H``; the caller may write into it.
    """
    n, heads, size = keys.shape
    rows = queries.shape[0]
    group = queries.shape[1] // heads
    # The products are taken in fp32: bf16 would round logits of 20 by 0.06, and is no faster on the CPUs measured.
    k_HDn = keys.permute(1, 2, 0).float()
    q_HRGD = queries.view(rows, heads, group, size).permute(1, 0, 2, 3).float() * size**-0.5
    step = max(1, _CHUNK_BYTES // (4 * n * heads * group))
    columns = torch.arange(n, device=keys.device)
    for start in range(0, rows, step):
        q = q_HRGD[:, start : start + step]
        logits = torch.bmm(q.reshape(heads, -1, size), k_HDn).view(heads, -1, group, n)
        if first_hidden is not None:
            hidden = columns >= first_hidden[start : start + step, None, None]
            logits.masked_fill_(hidden, float("-inf"))
        yield logits.softmax(-1)


def largest_weight(keys: Tensor, queries: Tensor) -> Tensor:
    """Largest softmax weight of each key over rows and the query heads of its group: fp32 ``[H, n]``."""
    best = keys.new_zeros((keys.shape[1], keys.shape[0]), dtype=torch.float32)
    for weights in attention_weights(keys, queries):
        torch.maximum(best, weights.flatten(1, 2).amax(1), out=best)
    return best
