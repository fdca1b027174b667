"""Every rule against naive loops over heads, rows and keys in fp64, and what rules refuse."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from torch import Tensor

from chunk_cache.retention import RETENTION_RULES, RetentionError, create_rule, keep_top
from chunk_cache.retention import attention as attention_module

SIZES = [(40, 3, 3, 8, 7), (19, 1, 2, 4, 1), (99, 4, 1, 16, 19)]
"""Keys, KV heads, query heads of each, head size, rows."""


def inputs(
    n: int, heads: int, group: int, size: int, rows: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """Keys, values, queries, positions with holes, and the next position."""
    generator = torch.Generator().manual_seed(n * 7 + rows)
    keys = torch.randn((n, heads, size), generator=generator).to(dtype)
    values = torch.randn((n, heads, size), generator=generator).to(dtype)
    queries = (2 * torch.randn((rows, heads * group, size), generator=generator)).to(dtype)
    old = n - rows
    where = [
        torch.cat(
            (
                torch.randperm(2 * n, generator=generator)[:old].sort().values,
                torch.arange(2 * n, 2 * n + rows),
            )
        )
        for _ in range(heads)
    ]
    return keys, values, queries, torch.stack(where), 2 * n + rows


def softmax(logits: list[float]) -> list[float]:
    top = max(logits)
    total = sum(math.exp(x - top) for x in logits)
    return [math.exp(x - top) / total for x in logits]


def weights(keys: Tensor, queries: Tensor, row: int, head: int, seen: int) -> list[float]:
    """Softmax of a row's query head over the first ``seen`` keys."""
    group = queries.shape[1] // keys.shape[1]
    q = queries[row, head].double()
    k = keys[:seen, head // group].double()
    return softmax((k @ q / math.sqrt(keys.shape[2])).tolist())


def naive_largest(keys: Tensor, queries: Tensor) -> Tensor:
    n, heads, _ = keys.shape
    group = queries.shape[1] // heads
    best = [[0.0] * n for _ in range(heads)]
    for row in range(queries.shape[0]):
        for head in range(queries.shape[1]):
            for i, weight in enumerate(weights(keys, queries, row, head, n)):
                best[head // group][i] = max(best[head // group][i], weight)
    return torch.tensor(best)


def naive_snapkv(keys: Tensor, queries: Tensor, kernel: int, pooling: str) -> Tensor:
    n, heads, _ = keys.shape
    rows = queries.shape[0]
    group, past = queries.shape[1] // heads, n - rows
    mean = [[0.0] * past for _ in range(heads)]
    for row in range(rows):
        for head in range(queries.shape[1]):
            seen = past + row + 1
            for i, weight in enumerate(weights(keys, queries, row, head, seen)[:past]):
                mean[head // group][i] += weight / rows / group
    scores = torch.ones(heads, n)
    for head in range(heads):
        for i in range(past):
            near = mean[head][max(0, i - kernel // 2) : i + kernel // 2 + 1]
            scores[head, i] = sum(near) / kernel if pooling == "avg" else max(near)
    return scores


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("name", ["epicache", "kvzip"])
def test_the_largest_weight_is_that_of_loops(
    name: str,
    shape: tuple[int, int, int, int, int],
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = inputs(*shape, dtype)
    scores = create_rule(name).scores(*given)
    torch.testing.assert_close(scores, naive_largest(given[0], given[2]), rtol=1e-4, atol=1e-6)
    monkeypatch.setattr(attention_module, "_CHUNK_BYTES", 1)  # row by row
    torch.testing.assert_close(create_rule(name).scores(*given), scores, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize(("kernel", "pooling"), [(1, "avg"), (5, "avg"), (3, "max")])
def test_snapkv_is_that_of_loops(
    shape: tuple[int, int, int, int, int], kernel: int, pooling: str
) -> None:
    given = inputs(*shape, torch.bfloat16)
    rule = create_rule(f"snapkv:window={shape[-1]}+kernel={kernel}+pooling={pooling}")
    scores = rule.scores(*given)
    expected = naive_snapkv(given[0], given[2], kernel, pooling)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-6)
    assert rule.window_rows == shape[-1]


def test_snapkv_keeps_its_window() -> None:
    given = inputs(40, 3, 3, 8, 7, torch.float32)
    rule = create_rule("snapkv:window=7")
    kept = keep_top(rule.scores(*given), 10, rule.pinned(given[3], given[4]))
    assert (kept[:, -7:] == torch.arange(33, 40)).all()


def test_snapkv_refuses_queries_of_other_tokens() -> None:
    keys, values, queries, positions, after = inputs(40, 3, 3, 8, 7, torch.float32)
    with pytest.raises(RetentionError, match="window's 7 queries"):
        create_rule("snapkv:window=7").scores(keys, values, queries, positions, after + 1)


@pytest.mark.parametrize("shape", SIZES)
def test_keydiff_is_that_of_loops(shape: tuple[int, int, int, int, int]) -> None:
    given = inputs(*shape, torch.bfloat16)
    keys = given[0].double()
    scores = create_rule("keydiff").scores(given[0], given[1], None, given[3], given[4])
    for head in range(shape[1]):
        units = [key / key.norm() for key in keys[:, head]]
        anchor = sum(units, torch.zeros(shape[3], dtype=torch.float64)) / shape[0]
        for i, unit in enumerate(units):
            assert float(scores[head, i]) == pytest.approx(
                -float(unit @ anchor) / float(anchor.norm()), abs=1e-5
            )


def test_streaming_keeps_sinks_and_the_latest() -> None:
    positions = torch.tensor([[3, 5, 6, 9, 10], [2, 5, 7, 9, 10]])
    keys = torch.randn(5, 2, 4)
    rule = create_rule("streaming:first=1")
    scores = rule.scores(keys, keys, None, positions, 11)
    kept = keep_top(scores, 3, rule.pinned(positions, 11))
    assert positions.gather(1, kept).tolist() == [[3, 9, 10], [2, 9, 10]]


def test_random_is_a_uniform_sample_whatever_the_blocks() -> None:
    keys = torch.zeros(1000, 2, 4)
    positions = torch.arange(1000).expand(2, -1)
    rule = create_rule("random")
    scores = rule.scores(keys, keys, None, positions, 1000)
    once = keep_top(scores, 250)
    seen = torch.empty(2, 0, dtype=torch.int64)
    for start in range(0, 1000, 100):  # block by block
        seen = torch.cat((seen, torch.arange(start, start + 100).expand(2, -1)), 1)
        some = torch.zeros(seen.shape[1], 2, 4)
        seen = seen.gather(1, keep_top(rule.scores(some, some, None, seen, start + 100), 250))
    assert torch.equal(seen, once)
    quarters = Counter((once // 250).flatten().tolist())
    assert min(quarters.values()) > 90  # 125 expected
    assert len(set(once[0].tolist()) & set(once[1].tolist())) < 100  # heads differ: 62 expected
    other = create_rule("random:seed=1").scores(keys, keys, None, positions, 1000)
    assert not torch.equal(other, scores)


@pytest.mark.parametrize("name", RETENTION_RULES.names())
def test_first_tokens_stay_pinned_over_blocks(name: str) -> None:
    keys, values, queries, _, _ = inputs(99, 4, 1, 16, 19, torch.float32)
    rule = create_rule(f"{name}:first=4")
    positions = torch.arange(99).expand(4, -1)
    kept = keep_top(
        rule.scores(keys, values, queries, positions, 99), 70, rule.pinned(positions, 99)
    )
    assert (kept[:, :4] == torch.arange(4)).all()
    assert kept.shape == (4, 70)


@pytest.mark.parametrize("name", RETENTION_RULES.names())
def test_an_identity_is_read_back(name: str) -> None:
    rule = create_rule(name)
    assert create_rule(rule.identity).identity == rule.identity
    assert create_rule(f"{name}:first=7").identity != rule.identity


@pytest.mark.parametrize(
    ("name", "which"),
    [
        (name, which)
        for name in RETENTION_RULES.names()
        for which in ((0, 1) if create_rule(name).probe == "none" else (0, 1, 2))
    ],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_none_are_refused(name: str, value: float, which: int) -> None:
    given = list(inputs(40, 3, 3, 8, 7, torch.bfloat16))
    rule = create_rule(name)
    given[which][3, 1, 2] = value
    with pytest.raises(RetentionError, match="infinities or NaN"):
        rule.scores(*given)


@pytest.mark.parametrize("name", RETENTION_RULES.names())
def test_tensors_that_do_not_fit_are_refused(name: str) -> None:
    keys, values, queries, positions, after = inputs(40, 3, 3, 8, 7, torch.float32)
    rule = create_rule(name)
    with pytest.raises(RetentionError, match="expected"):
        rule.scores(keys, values[1:], queries, positions, after)
    with pytest.raises(RetentionError, match="expected"):
        rule.scores(keys, values, queries, positions[:2], after)
    with pytest.raises(RetentionError, match="rise"):
        rule.scores(keys, values, queries, positions.flip(1), after)
    with pytest.raises(RetentionError, match="rise"):
        rule.scores(keys, values, queries, positions, after - 1)
    if rule.probe != "none":
        with pytest.raises(RetentionError, match="queries None"):
            rule.scores(keys, values, None, positions, after)
        with pytest.raises(RetentionError, match="do not fit"):
            rule.scores(keys, values, queries[:, :4], positions, after)


@pytest.mark.parametrize("name", RETENTION_RULES.names())
def test_no_keys_have_no_scores(name: str) -> None:
    none = torch.zeros(0, 3, 8)
    queries = torch.ones(2, 9, 8)
    assert create_rule(name).scores(
        none, none, queries, torch.zeros(3, 0, dtype=torch.int32), 0
    ).shape == (3, 0)


def test_a_rule_is_made_once_per_text_and_anew_for_another_class_of_its_name() -> None:
    text = "streaming:first=3"
    assert create_rule(text) is create_rule(text)
    assert create_rule(text) is not create_rule("streaming:first=5")
    made = []
    for _ in range(2):

        class Mine(type(create_rule("streaming"))):  # type: ignore[misc]
            name = "mine"

        RETENTION_RULES.register("mine", Mine)
        try:
            made.append(create_rule("mine"))
        finally:
            RETENTION_RULES.unregister("mine")
        assert type(made[-1]) is Mine
        with pytest.raises(ValueError, match="choose one of"):
            create_rule("mine")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nix", "choose one of epicache"),
        ("epicache:first", "OPTION=VALUE"),
        ("epicache:first=-1", "0 or more"),
        ("epicache:first=a", "expected int"),
        ("snapkv:kernel=4", "odd"),
        ("snapkv:kernel=100001", "at most"),
        ("snapkv:window=0", "1 or more"),
        ("snapkv:pooling=sum", "one of avg, max"),
        ("keydiff:window=3", "has no option 'window'"),
        ("streaming:first=1+first=2", "each once"),
    ],
)
def test_bad_texts_are_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        create_rule(text)
    assert "\n" not in str(refused.value)
