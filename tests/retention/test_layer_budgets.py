"""Budgets of layers: the total is exact, the floor holds, and more sensitive layers never get less."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from chunk_cache.retention import layer_budgets


@pytest.mark.parametrize("seed", range(10))
def test_the_total_is_exact_and_the_floor_holds(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(50):
        check_budgets(rng)


def check_budgets(rng: random.Random) -> None:
    layers, budget = rng.randint(1, 40), rng.choice([1, 2, 7, 100, 2048])
    values = [rng.choice([rng.random(), 0.9, 1.0, rng.uniform(0.98, 1)]) for _ in range(layers)]
    alpha, floor = rng.choice([0, 0.5, 1.1, 1.3, 6.0]), rng.choice([0, 0.25, 0.5, 1.0])
    found = layer_budgets(values, budget, alpha=alpha, floor=floor)
    assert sum(found) == budget * layers
    assert min(found) >= int(floor * budget)
    order = sorted(range(layers), key=lambda i: values[i])
    for a, b in pairwise(order):
        if values[a] < values[b]:
            assert found[a] >= found[b] - 1  # rounding alone may give one more
    if floor == 1.0:
        assert found == (budget,) * layers


def test_the_published_floor_would_break_the_total() -> None:
    values, budget = [0.0, 0.0, *[1.0] * 8], 100
    published = [max(int(budget * 10 * (1 - v) / 2), budget // 4) for v in values]
    assert sum(published) > budget * 10
    assert layer_budgets(values, budget, alpha=1) == (400, 400, *[25] * 8)


def test_layers_alike_or_alpha_0_are_uniform() -> None:
    assert layer_budgets([0.7] * 5, 64) == (64,) * 5
    assert layer_budgets([0.1, 0.9], 64, alpha=0) == (64, 64)


@pytest.mark.parametrize(
    ("sensitivity", "more", "message"),
    [
        ([], {}, "one finite number per layer"),
        ([0.1, float("nan")], {}, "finite"),
        ([0.1, 0.2], {"budget": 0}, "budget is 0"),
        ([0.1, 0.2], {"alpha": -1.0}, "alpha is -1"),
        ([0.1, 0.2], {"alpha": float("nan")}, "alpha is nan"),
        ([0.1, 0.2], {"floor": 1.5}, "floor is 1.5"),
    ],
)
def test_what_makes_no_sense_is_refused(
    sensitivity: list[float], more: dict[str, float], message: str
) -> None:
    given = {"budget": 10, **more}
    with pytest.raises(ValueError, match=message):
        layer_budgets(sensitivity, **given)  # type: ignore[arg-type]
