"""Own tokens come first: against sorting and looking up in plain Python, and two such memories made one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from chunk_cache.retention import (
    Kept,
    RetentionError,
    keep_own,
    keep_top,
    merge_kept,
    own_columns,
    own_free,
    own_order,
    own_ranks,
)


def plain_order(
    scores: Tensor, own: Tensor, free: int, pinned: Tensor | None = None
) -> list[list[int]]:
    """Fill each head's list one column after the other."""
    orders = []
    for head in range(scores.shape[0]):
        left = sorted(range(scores.shape[1]), key=lambda i, head=head: (-float(scores[head, i]), i))
        order: list[int] = []
        while left:
            first = [] if pinned is None else [i for i in left if bool(pinned[head, i])]
            mine = [i for i in left if bool(own[head, i])]
            order.append((first or (left if len(order) < free else mine or left))[0])
            left.remove(order[-1])
        orders.append(order)
    return orders


@pytest.mark.parametrize("seed", range(30))
def test_own_columns_stay_before_others_that_score_more(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    n, budget = 1 + seed * 2, 1 + seed % 11
    free = int(torch.randint(0, budget + 1, (), generator=generator))
    scores = torch.randint(0, 9, (3, n), generator=generator).float()  # many ties
    own = torch.rand((3, n), generator=generator) < 0.4
    pinned = torch.rand((3, n), generator=generator) < 0.1
    for stays in (None, pinned):
        order = plain_order(scores, own, free, stays)
        assert own_order(scores, own, free, stays).tolist() == order
        kept = [sorted(one[:budget]) for one in order]
        assert keep_own(scores, budget, own, free, stays).tolist() == kept
    ranks = own_ranks(scores, own, free)
    for head, row in enumerate(plain_order(scores, own, free)):
        assert [row.index(i) for i in range(n)] == ranks[head].tolist()


def test_all_own_none_own_or_all_free_is_the_order_by_score() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(2, 20, generator=generator)
    own = torch.rand(2, 20, generator=generator) < 0.5
    wanted = keep_top(scores, 6).tolist()
    assert keep_own(scores, 6, torch.ones_like(own), 0).tolist() == wanted
    assert keep_own(scores, 6, torch.zeros_like(own), 0).tolist() == wanted
    assert keep_own(scores, 6, own, own_free(6, 0.0)).tolist() == wanted
    assert keep_own(scores, 6, own, own_free(6, 1.0)).tolist() != wanted
    assert own_free(8, 0.75) == 2


@pytest.mark.parametrize("spans", [[], [(0, 3)], [(2, 4), (4, 5), (9, 40)], [(1, 2), (30, 31)]])
def test_columns_are_own_whose_positions_lie_in_a_span(spans: list[tuple[int, int]]) -> None:
    positions = torch.tensor([[0, 1, 2, 3, 4, 8, 9], [1, 5, 6, 30, 31, 39, 40]], dtype=torch.int32)
    wanted = [[any(a <= p < b for a, b in spans) for p in row] for row in positions.tolist()]
    assert own_columns(positions, spans).tolist() == wanted
    as_stored = torch.tensor(spans, dtype=torch.int32).reshape(-1, 2)
    assert own_columns(positions, as_stored).tolist() == wanted


def test_a_mask_of_another_shape_is_refused() -> None:
    with pytest.raises(RetentionError, match="expected bool"):
        own_order(torch.zeros(1, 3), torch.zeros(1, 2, dtype=torch.bool), 0)
    with pytest.raises(RetentionError, match="budget is 0"):
        keep_own(torch.zeros(1, 3), 0, torch.zeros(1, 3, dtype=torch.bool), 0)


def ranked(positions: list[int], scores: list[float], own: list[tuple[int, int]]) -> Kept:
    where, by = torch.tensor([positions]), torch.tensor([scores])
    k = where.T[..., None].float()
    return Kept(
        k=k, v=k, positions=where, scores=by, ranks=own_ranks(by, own_columns(where, own), 0)
    )


def test_a_merge_keeps_what_each_put_first() -> None:
    # Both give their highest scores to 0 and 9, which are nobody's own.
    a = ranked([0, 1, 2, 9], [0.9, 0.1, 0.2, 0.8], [(1, 3)])
    b = ranked([0, 5, 6, 9], [0.7, 0.3, 0.4, 0.95], [(5, 7)])
    assert merge_kept(a, b, 4).positions.tolist() == [[1, 2, 5, 6]]
    by_score = [Kept(k=x.k, v=x.v, positions=x.positions, scores=x.scores) for x in (a, b)]
    assert merge_kept(*by_score, 4).positions.tolist() == [[0, 5, 6, 9]]


@pytest.mark.parametrize("seed", range(20))
def test_a_merge_keeps_the_better_half_of_each(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    budget, records = 7, []
    for own in ([(0, 10)], [(10, 20)]):
        where = torch.randperm(20, generator=generator)[:budget].sort().values.tolist()
        scores = torch.rand(budget, generator=generator).tolist()
        records.append(ranked(where, scores, own))
    merged = merge_kept(*records, budget)
    kept = dict(zip(merged.positions[0].tolist(), merged.scores[0].tolist(), strict=True))
    assert len(kept) == budget
    best: dict[int, tuple[int, float]] = {}
    for one in records:
        rows = zip(one.positions[0].tolist(), one.ranks[0].tolist(), one.scores[0].tolist(), strict=True)  # type: ignore[index]  # fmt: skip
        for position, rank, score in rows:
            if rank < budget // 2:
                assert position in kept
            if position not in best or rank < best[position][0]:
                best[position] = rank, score
    assert all(kept[position] == best[position][1] for position in kept)
