"""The reference of block-wise prefill with eviction: against the model itself, and against masks over a full prefill."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from chunk_cache.retention import create_rule
from rag_eval.retention import (
    LayerCache,
    ReferenceMemory,
    ShownModel,
    build_memory,
    keep_pair,
    patched_scores,
    rule_scores,
)

BLOCK = 16
LAYERS = 3
SYSTEM = [3, 1, 4, 1, 5]
HISTORY = [(7 * i * i + 3 * i) % 61 for i in range(4 * BLOCK)]
PROBE = [9, 2, 6, 5]
QUESTION = [8, 9, 7, 9]


def build(model: ShownModel, budget: int | list[int], **more: object) -> ReferenceMemory:
    budgets = [budget] * LAYERS if isinstance(budget, int) else budget
    given: dict[str, object] = {"score": patched_scores, "probe": lambda block: PROBE} | more
    return build_memory(model, SYSTEM, HISTORY, block_tokens=BLOCK, budgets=budgets, **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("level", ["pair", "pair-uniform"])
def test_a_budget_of_the_whole_history_is_the_full_prefill(
    plain: LlamaForCausalLM, model: ShownModel, level: str
) -> None:
    memory = build(model, len(HISTORY), level=level)
    found = memory.answer(model, QUESTION, logits=4).logits
    with torch.no_grad():
        expected = plain(torch.tensor([SYSTEM + HISTORY + QUESTION]), logits_to_keep=4).logits[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def masked_logits(model: ShownModel, memory: ReferenceMemory, seen: list[list[Tensor]]) -> Tensor:
    """One pass over everything, each block and the question reading only what ``seen`` lets it of earlier blocks."""
    ids = SYSTEM + HISTORY + QUESTION
    n = len(ids)
    masks = []
    for layer in range(LAYERS):
        heads = memory.kept[layer].k.shape[0]
        mask = torch.ones(n, n, dtype=torch.bool).tril().repeat(heads, 1, 1)
        for number, allowed in enumerate(seen):
            first = len(SYSTEM) + number * BLOCK
            rows = slice(first, first + BLOCK if number < 4 else n)
            for head in range(heads):
                past = torch.zeros(first, dtype=torch.bool)
                past[: len(SYSTEM)] = True
                past[allowed[layer][head]] = True
                mask[head, rows, :first] = past
        masks.append(mask)

    def masked(module, args, kwargs):  # type: ignore[no-untyped-def]
        index = module.layer_idx
        bias = torch.zeros(masks[index].shape).masked_fill(~masks[index], float("-inf"))
        return args, kwargs | {"attention_mask": bias.repeat_interleave(3, 0)[None]}

    copy = deepcopy(model.model)
    copy.set_attn_implementation("eager")
    for layer in copy.model.layers:
        layer.self_attn.register_forward_pre_hook(masked, with_kwargs=True)
    with torch.no_grad():
        return copy(torch.tensor([ids]), logits_to_keep=4, use_cache=False).logits[0]


@pytest.mark.parametrize("level", ["pair", "pair-uniform"])
def test_an_evicted_token_is_a_masked_one(model: ShownModel, level: str) -> None:
    seen = []
    for blocks in range(5):  # what is kept in front of each block, and in front of the question
        if blocks == 0:
            seen.append([torch.zeros(2, 0, dtype=torch.int64)] * LAYERS)
            continue
        part = build_memory(
            model, SYSTEM, HISTORY[: blocks * BLOCK], lambda _: PROBE, patched_scores,
            block_tokens=BLOCK, budgets=[20, 12, 24], level=level,  # type: ignore[arg-type]
        )  # fmt: skip
        seen.append([[one[one >= 0] for one in cache.positions] for cache in part.kept])
    found = part.answer(model, QUESTION, logits=4).logits
    torch.testing.assert_close(found, masked_logits(model, part, seen), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("budgets", [[20, 20, 20], [12, 31, 17]])
def test_what_is_kept_fits_the_budget_and_stays_where_it_was(
    model: ShownModel, budgets: list[int]
) -> None:
    full = build(model, len(HISTORY))
    first = build_memory(
        model, SYSTEM, HISTORY[: 2 * BLOCK], lambda _: PROBE, patched_scores,
        block_tokens=BLOCK, budgets=budgets,
    )  # fmt: skip
    memory = build(model, budgets)
    assert memory.next_position == len(SYSTEM) + len(HISTORY)
    for layer, cache in enumerate(memory.kept):
        assert cache.positions.shape == (2, budgets[layer])
        assert (cache.positions[:, 1:] > cache.positions[:, :-1]).all()
        assert cache.positions.min() >= len(SYSTEM)
        assert memory.peak[layer] <= budgets[layer] + BLOCK
        old = first.kept[layer]
        for head in range(2):  # a key that is still there is bit by bit the one of its block
            for column, position in enumerate(cache.positions[head].tolist()):
                where = (old.positions[head] == position).nonzero().flatten()
                if position < len(SYSTEM) + 2 * BLOCK:
                    assert torch.equal(cache.k[head, column], old.k[head, int(where)])
    # Layer 0 sees token ids and positions alone, so there eviction changes no key.
    cache, whole = memory.kept[0], full.kept[0]
    columns = cache.positions - len(SYSTEM)
    torch.testing.assert_close(cache.k, whole.take(columns).k, rtol=1e-5, atol=1e-5)


def test_heads_of_a_layer_share_a_budget_at_the_level_pair(model: ShownModel) -> None:
    memory = build(model, 20, level="pair")
    counts = [(cache.positions >= 0).sum(1) for cache in memory.kept]
    assert [int(count.sum()) for count in counts] == [40] * LAYERS
    assert any(int(count[0]) != int(count[1]) for count in counts)
    assert max(memory.peak) <= 20 + BLOCK


def test_pairs_are_kept_by_the_best_scores_of_all_heads() -> None:
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.5], [0.8, 0.2, 0.7, float("-inf")]])
    pinned = torch.zeros_like(scores, dtype=torch.bool)
    columns, counts = keep_pair(scores, 2, pinned)
    assert counts.tolist() == [2, 2]
    assert columns.tolist() == [[1, 2], [0, 2]]
    pinned[1, 1] = True
    columns, counts = keep_pair(scores, 1, pinned)
    assert counts.tolist() == [1, 1]
    assert columns.tolist() == [[1], [1]]


@pytest.mark.parametrize("inside", [True, False])
def test_the_published_rule_is_ours(model: ShownModel, inside: bool) -> None:
    rule = create_rule("epicache:first=2")
    ours = build(model, 20, score=rule_scores(rule), pinned=rule.pinned, system_in_softmax=inside)
    published = build(model, 20, pinned=rule.pinned, system_in_softmax=inside)
    for a, b in zip(ours.kept, published.kept, strict=True):
        assert torch.equal(a.positions, b.positions)
        assert torch.equal(a.k, b.k)
        assert (a.positions[:, :2] == torch.tensor([5, 6])).all()


@pytest.mark.parametrize("name", ["snapkv:window=8", "keydiff", "streaming", "random"])
def test_rules_without_a_probe_run_over_blocks(model: ShownModel, name: str) -> None:
    rule = create_rule(name)
    memory = build(
        model, 20, score=rule_scores(rule), probe=lambda block: [],
        window_rows=rule.window_rows, pinned=rule.pinned,
    )  # fmt: skip
    newest = memory.next_position - 1
    for cache in memory.kept:
        assert cache.positions.shape == (2, 20)
        if name.startswith(("snapkv", "streaming")):
            assert (cache.positions[:, -8:] == torch.arange(newest - 7, newest + 1)).all()


def test_a_build_may_start_from_blocks_that_are_there(model: ShownModel) -> None:
    rows = model.forward(SYSTEM + HISTORY[:BLOCK], 0).layers
    start = [
        LayerCache.of_rows(one, 0).take(torch.arange(5, 5 + BLOCK).expand(2, -1)) for one in rows
    ]
    a, b = build(model, 20), build(model, 20, start=start)
    for x, y in zip(a.kept, b.kept, strict=True):
        assert torch.equal(x.positions, y.positions)
        torch.testing.assert_close(x.k, y.k, rtol=1e-4, atol=1e-4)


def test_own_tokens_of_a_block_stay_before_others(model: ShownModel) -> None:
    own = {0: [(5, 11)], 1: [(5, 11), (30, 34)], 2: [(5, 11), (30, 34)], 3: [(64, 69)]}
    kept = build(model, 12, own=own.__getitem__).kept
    published = build(model, 12).kept
    for layer, plain in zip(kept, published, strict=True):
        for positions in layer.positions.tolist():
            assert set(range(64, 69)) <= set(positions)
        assert layer.positions.shape == plain.positions.shape
    always = build(model, 12, own=lambda block: [(5, 11), (30, 34)]).kept
    for layer in always:
        for positions in layer.positions.tolist():
            assert {*range(5, 11), *range(30, 34)} <= set(positions)
    half = build(model, 12, own=lambda block: [(5, 69)], own_share=0.5).kept
    for layer, plain in zip(half, published, strict=True):
        assert torch.equal(layer.positions, plain.positions)  # all is own
