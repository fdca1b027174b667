"""From scores to the slots of a memory: the best of each head in rising order, and two memories made one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from chunk_cache.retention.base import RetentionError


def keep_top(scores: Tensor, budget: int, pinned: Tensor | None = None) -> Tensor:
    """Columns of the best scores of each head.

    Parameters
    ----------
    scores : Tensor
        fp32 ``[H, n]``, finite.
    budget : int
        Columns to keep per head, 1 or more.
    pinned : Tensor, optional
        bool ``[H, n]``: these come before all others; among more of them than the budget holds, the best.

    Returns
    -------
    Tensor
        int64 ``[H, min(budget, n)]``, rising along each head. Of equal scores the earlier column stays.

    Raises
    ------
    RetentionError
        A budget below 1, scores that are not finite, or a mask that does not fit.
    """
    if budget < 1:
        raise RetentionError(f"budget is {budget} tokens; allowed is 1 or more")
    return stay_order(scores, pinned)[:, :budget].sort(dim=1).values


def stay_order(scores: Tensor, pinned: Tensor | None = None) -> Tensor:
    """Columns of each head in the order in which they stay, int64 ``[H, n]``; see :func:`keep_top`."""
    if scores.ndim != 2 or not scores.isfinite().all():
        raise RetentionError(f"scores {tuple(scores.shape)}: expected finite numbers [H, n]")
    if pinned is not None and (pinned.shape != scores.shape or pinned.dtype != torch.bool):
        raise RetentionError(
            f"pinned {pinned.dtype} {tuple(pinned.shape)}: expected bool {tuple(scores.shape)}"
        )
    # Two stable sorts: among equal scores the earlier one is first, and pinned ones come to the front as they are.
    order = torch.sort(scores, dim=1, descending=True, stable=True).indices
    if pinned is None:
        return order
    first = torch.sort(
        pinned.gather(1, order).to(torch.uint8), dim=1, descending=True, stable=True
    ).indices
    return order.gather(1, first)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Kept:
    """What one layer kept. Slot ``i`` of a head is another token than slot ``i`` of its neighbour.

    Attributes
    ----------
    k, v : Tensor
        ``[m, H, D]`` and ``[m, H, D_v]``.
    positions : Tensor
        int ``[H, m]``: true positions, rising along each head.
    scores : Tensor
        float ``[H, m]``: by what each stayed.
    ranks : Tensor, optional
        int ``[H, m]``: place of each in the order in which they stay, 0 for the last to go; None where scores tell it.
    """

    k: Tensor
    v: Tensor
    positions: Tensor
    scores: Tensor
    ranks: Tensor | None = None

    def __post_init__(self) -> None:
        m, heads = self.k.shape[:2]
        if (
            self.k.ndim != 3
            or self.v.shape[:2] != (m, heads)
            or self.positions.shape != (heads, m)
            or self.scores.shape != (heads, m)
            or (self.ranks is not None and self.ranks.shape != (heads, m))
        ):
            raise RetentionError(
                f"k {tuple(self.k.shape)}, v {tuple(self.v.shape)}, positions {tuple(self.positions.shape)}, "
                f"scores {tuple(self.scores.shape)}: expected [m, H, D] twice and [H, m] twice"
            )
        if bool((self.positions[:, 1:] <= self.positions[:, :-1]).any()):
            raise RetentionError("positions must rise along each head")
        if not self.scores.isfinite().all():
            raise RetentionError("a score is not finite")


def gather_slots(tensor: Tensor, columns: Tensor) -> Tensor:
    """Rows of each head: ``[n, H, D]`` and int64 ``[H, m]`` to ``[m, H, D]``."""
    index = columns.T.unsqueeze(-1).expand(-1, -1, tensor.shape[-1])
    return tensor.gather(0, index)


def merge_kept(a: Kept, b: Kept, budget: int) -> Kept:
    """Join what two memories of one conversation kept in a layer, and keep the best of both.

    Better is the higher score, or, where both have ranks, the lower rank: each memory then keeps at least the better half
    of the budget, since by score alone what one of them put first could lose to what both see everywhere. A token that
    both kept counts once, with the KV and the score of the better one (of equals, that of ``a``). Scores of
    two rules cannot be compared: both memories must come from the same one. Both keys must be in the same frame.

    Returns
    -------
    Kept
        As many slots as every head can fill, ``budget`` at most. That is never less than the smaller of ``budget``
        and the larger memory.

    Raises
    ------
    RetentionError
        A budget below 1, or memories of different shapes, dtypes or devices.
    """
    if budget < 1:
        raise RetentionError(f"budget is {budget} tokens; allowed is 1 or more")
    same = all(
        one.shape[1:] == other.shape[1:] and one.dtype == other.dtype and one.device == other.device
        for one, other in ((a.k, b.k), (a.v, b.v))
    )
    if not same:
        raise RetentionError(
            f"memories do not fit: keys {a.k.dtype} {tuple(a.k.shape)} and {b.k.dtype} {tuple(b.k.shape)}"
        )
    positions = torch.cat((a.positions, b.positions.to(a.positions.dtype)), 1)
    scores = torch.cat((a.scores, b.scores), 1).float()
    goodness = scores
    if a.ranks is not None and b.ranks is not None:
        goodness = -torch.cat((a.ranks, b.ranks), 1).float()
    # By position, within it by how good: the first of equal positions is the one that counts.
    order = torch.sort(goodness, dim=1, descending=True, stable=True).indices
    order = order.gather(1, torch.sort(positions.gather(1, order), dim=1, stable=True).indices)
    positions, scores = positions.gather(1, order), scores.gather(1, order)
    goodness = goodness.gather(1, order)
    again = torch.zeros_like(positions, dtype=torch.bool)
    again[:, 1:] = positions[:, 1:] == positions[:, :-1]
    most = positions.shape[1] - int(again.sum(1).max())  # every head must fill its slots
    columns = keep_top(goodness, max(1, min(budget, most)), ~again)
    source = order.gather(1, columns)
    return Kept(
        k=gather_slots(torch.cat((a.k, b.k)), source),
        v=gather_slots(torch.cat((a.v, b.v)), source),
        positions=positions.gather(1, columns),
        scores=scores.gather(1, columns).to(a.scores.dtype),
    )
