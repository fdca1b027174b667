"""What a prefill leaves as a memory: real stores and rules, KV without a model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from memory_lives import (
    BLOCK,
    BUDGET,
    DIM,
    GROUP,
    HEADS,
    LAYERS,
    PREFIX,
    PROBE,
    SPEC,
    Talk,
)

from rag_kernels import rerotate_keys
from rag_pipeline.protocol import MemoryFields, MemoryStore
from rag_pipeline.sglang_plugin.fusion.forward import model_forward
from rag_pipeline.sglang_plugin.fusion.memory import leasing
from rag_pipeline.sglang_plugin.fusion.memory.keeping import conclude


def brute_force(keys: torch.Tensor, queries: torch.Tensor, budget: int) -> tuple[Any, Any]:
    """Columns that stay, of each head: by loops, in fp64; and every column's score."""
    chosen, scores = [], []
    for head in range(HEADS):
        best = torch.zeros(keys.shape[0]).double()
        for row in range(queries.shape[0]):
            for q in range(head * GROUP, (head + 1) * GROUP):
                logits = keys[:, head].double() @ queries[row, q].double() / DIM**0.5
                best = torch.maximum(best, logits.softmax(0))
        order = sorted(range(len(best)), key=lambda i, best=best: (-float(best[i]), i))
        chosen.append(sorted(order[:budget]))
        scores.append(best)
    return chosen, scores


def test_the_best_of_each_head_stay_at_their_true_positions_and_old_ones_bit_for_bit(memory_lives):
    engine, talk = memory_lives(), Talk()
    before = None
    for number in range(4):
        state, (keys, values, queries) = talk.step(engine)
        record = engine.found(talk.name)
        assert record is not None
        num_old = 0 if before is None else BUDGET
        end, true_end = PREFIX + num_old + BLOCK, PREFIX + (number + 1) * BLOCK
        assert record.base_position == true_end - BUDGET
        assert record.token_ids.tolist() == talk.history[-BUDGET:]
        assert record.seen_ids.tolist() == [*talk.prefix, *talk.history]
        assert record.codec == "plain"
        for layer in range(LAYERS):
            probe = queries[layer, end : end + PROBE]
            chosen, scores = brute_force(keys[layer, PREFIX:end], probe, BUDGET)
            for head, columns in enumerate(chosen):
                new = range(true_end - BLOCK, true_end)
                old = [] if before is None else before.side["positions"][layer, head].tolist()
                true = [*old, *new]
                assert record.side["positions"][layer, head].tolist() == [true[c] for c in columns]
                got = record.side["scores"][layer, head].double()
                torch.testing.assert_close(got, scores[head][columns], rtol=1e-3, atol=1e-6)
                for slot, column in enumerate(columns):
                    if column < num_old:
                        wanted = before.k[layer, column, head], before.v[layer, column, head]
                    else:
                        at = PREFIX + column
                        moved = rerotate_keys(keys[layer, at : at + 1], true[column] - at, SPEC)
                        wanted = moved[0, head], values[layer, at, head]
                    assert torch.equal(record.k[layer, slot, head], wanted[0])
                    assert torch.equal(record.v[layer, slot, head], wanted[1])
        before = record
    assert engine.counts()["memories.stored"] == 4
    assert state.memory is not None


@pytest.mark.parametrize("share", [1.0, 0.6])
def test_own_tokens_stay_before_others_and_scores_are_the_rules(memory_lives, share):
    own = ((PREFIX + 2, PREFIX + 5), (PREFIX + 14, PREFIX + 23))  # the last one goes on behind
    engine, talk = memory_lives(), Talk(own=own, own_share=share)
    free, old = round(BUDGET * (1 - share)), [[[] for _ in range(HEADS)] for _ in range(LAYERS)]
    for number in range(3):
        _, (keys, _, queries) = talk.step(engine)
        record = engine.found(talk.name)
        assert record is not None
        end = PREFIX + (BUDGET if number else 0) + BLOCK
        for layer in range(LAYERS):
            probe = queries[layer, end : end + PROBE]
            _, scores = brute_force(keys[layer, PREFIX:end], probe, BUDGET)
            for head, by in enumerate(scores):
                true = [*old[layer][head], *range(PREFIX + number * BLOCK, PREFIX + (number + 1) * BLOCK)]  # fmt: skip
                order = sorted(range(len(by)), key=lambda c, by=by: (-float(by[c]), c))
                mine = [c for c in order if any(a <= true[c] < b for a, b in own)]
                kept = list(dict.fromkeys([*order[:free], *mine, *order]))[:BUDGET]
                got = record.side["positions"][layer, head].tolist()
                assert got == sorted(true[c] for c in kept)
                near = record.side["scores"][layer, head].double()
                torch.testing.assert_close(near, by[sorted(kept)], rtol=1e-3, atol=1e-6)
                old[layer][head] = got
    assert record.side["own_spans"].tolist() == [list(span) for span in own]
    assert record.side["own_free"].tolist() == [free]
    plain = Talk()
    plain.step(engine)
    assert "own_spans" not in engine.found(plain.name).side


def test_a_budget_above_the_history_keeps_everything_and_nothing_is_rotated(memory_lives):
    engine, talk = memory_lives(), Talk(budget=100)
    for _ in range(3):
        _, (keys, _, _) = talk.step(engine)
    record = engine.found(talk.name)
    assert record.base_position == PREFIX
    assert (record.side["positions"] == torch.arange(PREFIX, PREFIX + 30, dtype=torch.int32)).all()
    assert torch.equal(record.k, keys[:, PREFIX : PREFIX + 30])


@pytest.mark.parametrize("rule", ["streaming:first=2", "snapkv:window=4+kernel=1", "keydiff"])
def test_rules_without_a_probe_take_the_blocks_own_rows_or_none(memory_lives, rule):
    engine, talk = memory_lives(), Talk(rule=rule)
    for _ in range(3):
        state, _ = talk.step(engine)
        assert engine.found(talk.name) is not None
    positions = engine.found(talk.name).side["positions"]
    if rule.startswith("streaming"):
        assert (positions == torch.tensor([PREFIX, PREFIX + 1, *range(31, 36)])).all()
    if rule.startswith("snapkv"):
        assert (positions[..., -4:] == torch.arange(32, 36)).all()
    assert leasing.matched_until(state) == PREFIX


@pytest.mark.parametrize("window", [BLOCK, BLOCK + 2])
def test_a_window_beyond_the_first_block_ends_at_the_prefix(memory_lives, window):
    engine, talk = memory_lives(), Talk(rule=f"snapkv:window={window}+kernel=1")
    for begin in (PREFIX, PREFIX + BLOCK):
        talk.step(engine)
        record = engine.found(talk.name)
        assert record is not None
        # All of the block is pinned, and the budget holds its beginning.
        assert (record.side["positions"] == torch.arange(begin, begin + BUDGET)).all()


def test_a_step_whose_queries_were_not_all_seen_leaves_nothing(memory_lives):
    engine, talk = memory_lives(), Talk()
    talk.step(engine, rows=slice(1, None))
    assert engine.found(talk.name) is None
    assert engine.counts()["memories.incomplete"] == 1


def test_what_is_there_is_known_and_not_computed_again(memory_lives):
    engine = memory_lives()
    one, two = Talk(), Talk()
    one.step(engine)
    state, _ = two.step(engine)
    assert two.name == one.name
    assert engine.counts()["memories.known"] == 1
    assert (state.memory.name, state.memory.kept) == (one.name, BUDGET)


def test_a_forward_that_was_given_up_leaves_no_memory(memory_lives, monkeypatch):
    """With several ranks a fused pass goes on with zeros behind a fault; its queries are of no use to any request in it."""
    engine, talk = memory_lives(), Talk()
    ids = [*talk.prefix, *range(100, 110), *range(1000, 1003)]
    store = MemoryStore(end=PREFIX + BLOCK, budget=BUDGET, rule="epicache")
    state = engine.state(ids, MemoryFields(store=store))
    assert state.memory.target is not None
    entry = SimpleNamespace(state=state, index=0)

    class Forward:
        def __init__(self, *args: Any) -> None: ...

        def prepare(self) -> Any:
            for layer in range(LAYERS):
                state.memory.note_queries(layer, torch.zeros(PROBE, HEADS * GROUP, DIM))
            raise RuntimeError("a fault")

    neighbour = SimpleNamespace(row_limit=1, method=None, forget_spans=lambda reason: None)
    plan = SimpleNamespace(entries=[entry], fused=[SimpleNamespace(state=neighbour)], refused="")
    monkeypatch.setattr(model_forward, "FusedForward", Forward)
    monkeypatch.setattr(model_forward, "ordinary_views", lambda *args: ["batch"])
    monkeypatch.setattr(model_forward, "bind_adapters", lambda *args: None)
    monkeypatch.setattr(model_forward, "_count_rows", lambda *args: None)
    said = model_forward._fused(engine.runtime, lambda runner, part: part, None, None, plan, (), {})
    assert said == "batch"
    pool = SimpleNamespace(
        get_key_buffer=lambda i: torch.randn(len(ids), HEADS, DIM),
        get_value_buffer=lambda i: torch.randn(len(ids), HEADS, DIM),
    )
    conclude(engine.runtime, state, pool, torch.arange(len(ids)))
    state.finish(len(ids))
    assert not list(engine.runtime.store.keys())
    assert not state.memory.name
