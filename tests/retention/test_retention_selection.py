"""Which columns stay, and two memories made one: against sorting in plain Python."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from chunk_cache.retention import Kept, RetentionError, gather_slots, keep_top, merge_kept


def plain_top(scores: Tensor, budget: int, pinned: Tensor | None = None) -> list[list[int]]:
    """Sort each head by (pinned, score, place) in Python and take the first."""
    kept = []
    for head in range(scores.shape[0]):
        order = sorted(
            range(scores.shape[1]),
            key=lambda i: (
                not (pinned is not None and bool(pinned[head, i])),
                -float(scores[head, i]),
                i,
            ),
        )
        kept.append(sorted(order[:budget]))
    return kept


@pytest.mark.parametrize("n", [1, 7, 64, 99])
@pytest.mark.parametrize("budget", [1, 6, 64, 200])
def test_the_best_of_each_head_stay_in_rising_order(n: int, budget: int) -> None:
    generator = torch.Generator().manual_seed(n * 1000 + budget)
    scores = torch.randint(0, 12, (3, n), generator=generator).float()  # many ties
    pinned = torch.rand((3, n), generator=generator) < 0.1
    assert keep_top(scores, budget).tolist() == plain_top(scores, budget)
    assert keep_top(scores, budget, pinned).tolist() == plain_top(scores, budget, pinned)


def test_of_equal_scores_the_earlier_stays() -> None:
    assert keep_top(torch.zeros(1, 5), 2).tolist() == [[0, 1]]


def test_of_more_pinned_than_fit_the_best_stay() -> None:
    pinned = torch.tensor([[True, True, True, False]])
    assert keep_top(torch.tensor([[1.0, 3.0, 2.0, 9.0]]), 2, pinned).tolist() == [[1, 2]]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_scores_that_are_no_numbers_are_refused(value: float) -> None:
    with pytest.raises(RetentionError, match="finite"):
        keep_top(torch.tensor([[1.0, value]]), 1)


def test_no_budget_is_refused() -> None:
    with pytest.raises(RetentionError, match="budget is 0"):
        keep_top(torch.zeros(1, 2), 0)


def memory(positions: list[list[int]], scores: list[list[float]], mark: float) -> Kept:
    """A memory whose keys tell where they come from: position, head, mark."""
    where = torch.tensor(positions)
    heads, m = where.shape
    k = torch.stack(
        (
            where.T.float(),
            torch.arange(heads).float().expand(m, heads),
            torch.full((m, heads), mark),
        ),
        -1,
    )
    return Kept(k=k, v=-k, positions=where, scores=torch.tensor(scores))


def test_a_merge_keeps_the_best_of_both_and_no_token_twice() -> None:
    a = memory([[0, 2, 5], [1, 2, 3]], [[0.9, 0.1, 0.5], [0.3, 0.2, 0.8]], 1)
    b = memory([[0, 3, 5], [4, 5, 6]], [[0.2, 0.6, 0.7], [0.1, 0.9, 0.25]], 2)
    merged = merge_kept(a, b, 3)
    assert merged.positions.tolist() == [[0, 3, 5], [1, 3, 5]]
    assert merged.k[:, 0].tolist() == [
        [0, 0, 1],
        [3, 0, 2],
        [5, 0, 2],
    ]  # the better one of 5 is b's
    assert merged.k[:, 1].tolist() == [[1, 1, 1], [3, 1, 1], [5, 1, 2]]
    assert torch.equal(merged.v, -merged.k)
    assert merged.scores.tolist() == torch.tensor([[0.9, 0.6, 0.7], [0.3, 0.8, 0.9]]).tolist()


@pytest.mark.parametrize("seed", range(20))
def test_a_merge_is_what_plain_python_makes(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    heads, m, budget = 2, int(torch.randint(1, 9, (), generator=generator)), 8
    records = []
    for mark in (1, 2):
        where = torch.stack(
            [torch.randperm(12, generator=generator)[:m].sort().values for _ in range(heads)]
        )
        scores = torch.randint(0, 6, (heads, m), generator=generator).float()
        records.append(memory(where.tolist(), scores.tolist(), mark))
    a, b = records
    merged = merge_kept(a, b, budget)
    unions = []
    for head in range(heads):
        best: dict[int, tuple[float, float]] = {}
        for mark, one in ((1.0, a), (2.0, b)):
            for position, score in zip(
                one.positions[head].tolist(), one.scores[head].tolist(), strict=True
            ):
                if position not in best or score > best[position][0]:
                    best[position] = (score, mark)
        unions.append(best)
    count = min(budget, *map(len, unions))
    assert m <= merged.positions.shape[1] == count
    for head, best in enumerate(unions):
        order = sorted(best, key=lambda position: (-best[position][0], position))[:count]
        assert merged.positions[head].tolist() == sorted(order)
        assert merged.k[:, head].tolist() == [[p, head, best[p][1]] for p in sorted(order)]


def test_a_memory_merged_with_itself_is_itself() -> None:
    a = memory([[0, 2, 5], [1, 2, 3]], [[0.9, 0.1, 0.5], [0.3, 0.2, 0.8]], 1)
    merged = merge_kept(a, a, 10)
    for name in ("k", "v", "positions", "scores"):
        assert torch.equal(getattr(merged, name), getattr(a, name))


def test_memories_of_other_shapes_are_refused() -> None:
    a = memory([[0, 2]], [[0.9, 0.1]], 1)
    b = memory([[0], [1]], [[0.9], [0.1]], 1)
    with pytest.raises(RetentionError, match="do not fit"):
        merge_kept(a, b, 2)
    with pytest.raises(RetentionError, match="rise"):
        memory([[2, 2]], [[0.9, 0.1]], 1)


def test_slots_are_gathered_per_head() -> None:
    tensor = torch.arange(8).view(4, 2, 1)
    columns = torch.tensor([[0, 3], [1, 2]])
    assert gather_slots(tensor, columns)[..., 0].tolist() == [[0, 3], [6, 5]]
