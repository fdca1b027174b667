"""Tokens of a memory's own text come first: an order of columns in front of which scores alone decide nothing.

A deviation of this project's own from EpiCache (https://arxiv.org/abs/2509.17396), where the record of an episode is kept by
scores alone: the patched prompt gives its highest weights to tokens that stand out in every text, and those of the
episode's own segments are kept hardly more often than by chance.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from chunk_cache.retention.base import RetentionError
from chunk_cache.retention.selection import stay_order


def own_columns(positions: Tensor, spans: Sequence[Sequence[int]] | Tensor) -> Tensor:
    """Which columns lie in spans of positions.

    Parameters
    ----------
    positions : Tensor
        int ``[H, n]``.
    spans : sequence of (int, int), or Tensor
        ``[S, 2]``, half-open, rising and disjoint.

    Returns
    -------
    Tensor
        bool ``[H, n]``.
    """
    edges = torch.as_tensor(spans, dtype=torch.int64, device=positions.device).reshape(-1)
    # The edges alternate between begin and end, so a position behind an odd number of them lies within a span.
    return torch.searchsorted(edges, positions.to(torch.int64).contiguous(), right=True) % 2 == 1


def own_free(budget: int, share: float) -> int:
    """How many slots scores alone decide: those of the budget that are not reserved for own tokens."""
    return round(budget * (1 - share))


def own_order(scores: Tensor, own: Tensor, free: int, pinned: Tensor | None = None) -> Tensor:
    """Columns of each head in the order in which they stay.

    The first `free` of the order by score, and whatever is pinned, are in front; then come own columns, then the others,
    each by score.

    Parameters
    ----------
    scores : Tensor
        fp32 ``[H, n]``, finite.
    own : Tensor
        bool ``[H, n]``.
    free : int
        Columns per head that are chosen by score whoever they are, 0 or more.
    pinned : Tensor, optional
        bool ``[H, n]``: as for :func:`~chunk_cache.retention.keep_top`.

    Returns
    -------
    Tensor
        int64 ``[H, n]``. Of equal scores the earlier column is first.

    Raises
    ------
    RetentionError
        As :func:`~chunk_cache.retention.keep_top` does, or a mask that does not fit.
    """
    if own.shape != scores.shape or own.dtype != torch.bool:
        raise RetentionError(
            f"own {own.dtype} {tuple(own.shape)}: expected bool {tuple(scores.shape)}"
        )
    order = stay_order(scores, pinned)
    rank = torch.where(own, 1, 2).gather(1, order)
    if pinned is not None:
        rank[pinned.gather(1, order)] = 0
    rank[:, :free] = 0
    return order.gather(1, torch.sort(rank, dim=1, stable=True).indices)


def own_ranks(scores: Tensor, own: Tensor, free: int) -> Tensor:
    """Place of each column in :func:`own_order`: int64 ``[H, n]``, 0 for the one that stays longest."""
    return own_order(scores, own, free).argsort(dim=1)


def keep_own(
    scores: Tensor, budget: int, own: Tensor, free: int, pinned: Tensor | None = None
) -> Tensor:
    """Columns that stay of each head, the first of :func:`own_order`.

    Returns
    -------
    Tensor
        int64 ``[H, min(budget, n)]``, rising along each head. With no own column, with all own, or with `free` at the budget it is that
        of :func:`~chunk_cache.retention.keep_top`.

    Raises
    ------
    RetentionError
        A budget below 1, or as :func:`own_order` does.
    """
    if budget < 1:
        raise RetentionError(f"budget is {budget} tokens; allowed is 1 or more")
    return own_order(scores, own, free, pinned)[:, :budget].sort(dim=1).values
