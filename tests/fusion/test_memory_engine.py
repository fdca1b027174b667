"""A conversation's memory of fixed size through the real engine, against the algorithm written out in torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fusion_helpers import PREFIX, PREFIX_IDS, agrees_with_oracle, chunk_limit, report, tokens
from memory_chats import BLOCK, BLOCKS, BUDGET, HISTORY, PROBE, PROBES, QUESTION, STEPS, Chat
from memory_oracle import MemoryOracle


@pytest.fixture(scope="module")
def oracle(tiny_model):
    return MemoryOracle(tiny_model("llama"))


def follow(oracle, chat, shared, memory, block, probe, true_len, *, first=0):
    """Make a step in the engine and by the definition; the record must be the definition's, slot by slot."""
    past, scores = oracle.step(shared, memory, block, probe, true_len)
    told = chat.step(block, probe)
    assert told["stored"]
    assert (told["id"], told["kept"]) == (chat.name, chat.budget)
    assert told["loaded"] == (0 if memory is None else chat.budget)
    record = chat.record()
    assert record.base_position == true_len + len(block) - chat.budget
    kept, by = oracle.follow(past, scores, record.side["positions"], first=first)
    for layer in range(oracle.layers):
        for head in range(oracle.kv_heads):
            near = {"rtol": 1e-3, "atol": 1e-3}
            got = record.side["scores"][layer, head].double()
            torch.testing.assert_close(got, by[layer][head], rtol=2e-3, atol=5e-4)
            # The record's keys lie in the frame of true positions.
            got = record.k[layer, :, head].double()
            torch.testing.assert_close(got, kept.keys[layer][head], **near)
            got = record.v[layer, :, head].double()
            torch.testing.assert_close(got, kept.values[layer][head], **near)
    return kept


def nearer(oracle, shared, memory, true_len):
    """The prefix as what stands behind the slots sees it: nearer by what was evicted between them."""
    evicted = true_len - PREFIX - (0 if memory is None else BUDGET)
    return shared if not evicted else oracle.moved(shared, evicted)


def test_what_is_kept_and_the_answer_are_those_of_the_algorithm_by_its_definition(engine, oracle):
    local = engine("llama")
    chat = Chat(local)
    shared, memory, true_len = oracle.prefill(PREFIX_IDS), None, PREFIX
    for block, probe in zip(BLOCKS, PROBES, strict=True):
        prefix = nearer(oracle, shared, memory, true_len)
        memory = follow(oracle, chat, prefix, memory, block, probe, true_len)
        true_len += len(block)
    req = chat.answer(QUESTION)
    told = report(req)
    assert told["memory"] == {"loaded": BUDGET, "missed": 0, "stored": False}
    assert (told["reused_tokens"], told["fresh_tokens"]) == (BUDGET, len(QUESTION))
    assert told["conversation_tokens"] == 0
    assert "moved_tokens" not in told
    prefix = nearer(oracle, shared, memory, true_len)
    agrees_with_oracle(req, oracle.answer(QUESTION, true_len, [prefix, memory]), 5e-4)


def test_a_prefix_that_is_pinned_in_the_record_stands_at_its_true_position(engine, oracle):
    """The published order: no token is nearer to any other than it was in the conversation."""
    local = engine("llama")
    chat = Chat(local, budget=PREFIX + BUDGET, rule=f"epicache:first={PREFIX}")
    chat.prefix = []
    memory, true_len = None, 0
    for block, probe in zip([[*PREFIX_IDS, *BLOCKS[0]], *BLOCKS[1:]], PROBES, strict=True):
        memory = follow(oracle, chat, None, memory, block, probe, true_len, first=PREFIX)
        true_len += len(block)
    req = chat.answer(QUESTION)
    assert report(req)["memory"] == {"loaded": PREFIX + BUDGET, "missed": 0, "stored": False}
    wanted = oracle.answer(QUESTION, true_len, [memory])
    agrees_with_oracle(req, wanted, 5e-4)
    # The test can tell: positions that begin behind the slots give another answer.
    wrong = oracle.answer(QUESTION, PREFIX + BUDGET, [memory])
    assert float((wrong - wanted).abs().max()) > 1e-2


@pytest.mark.parametrize("width", [BLOCK, BLOCK * STEPS], ids=["many blocks", "one block"])
def test_a_budget_above_the_history_gives_the_logits_of_full_prefill(engine, width):
    local = engine("llama")
    chat = Chat(local, budget=500)
    for at in range(0, len(HISTORY), width):
        assert chat.step(HISTORY[at : at + width], PROBES[0])["stored"]
    record = chat.record()
    assert record.base_position == PREFIX
    everything = torch.arange(PREFIX, PREFIX + len(HISTORY), dtype=torch.int32)
    assert (record.side["positions"] == everything).all()
    told = chat.answer(QUESTION)
    assert report(told)["memory"]["loaded"] == len(HISTORY)
    local.flush()
    full = local.ask([*PREFIX_IDS, *HISTORY, *QUESTION], 4, fusion={"mode": "off"}, top=20)
    assert list(told.output_ids) == list(full.output_ids)
    for got, wanted in zip(
        told.logprob.output_top_logprobs_val, full.logprob.output_top_logprobs_val, strict=True
    ):
        torch.testing.assert_close(torch.tensor(got), torch.tensor(wanted), rtol=1e-5, atol=1e-5)


def test_pieces_of_a_prompt_keep_what_the_whole_keeps(engine):
    local = engine("llama")
    whole = Chat(local)
    whole.build(3)
    record = whole.record()
    local.fresh()
    cut = Chat(local)
    with chunk_limit(local, 16):  # cuts blocks and probes, and falls into the slots
        assert all(told["stored"] for told in cut.build(3))
    assert cut.name == whole.name
    again = cut.record()
    assert again is not record
    for name in ("positions", "memory_id", "seen_ids"):
        assert torch.equal(again.side[name], record.side[name])
    torch.testing.assert_close(again.k, record.k, rtol=0, atol=1e-4)
    torch.testing.assert_close(again.v, record.v, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "rule", ["streaming:first=2", "snapkv:window=8+kernel=3", "keydiff", "kvzip", "random"]
)
def test_every_rule_makes_memories_that_answer(engine, rule):
    local = engine("llama")
    chat = Chat(local, rule=rule)
    for block in BLOCKS[:3]:
        assert chat.step(block, PROBES[0])["stored"]
    record = chat.record()
    if rule.startswith("streaming"):
        first, last = range(PREFIX, PREFIX + 2), range(PREFIX + 96 - BUDGET + 2, PREFIX + 96)
        assert (record.side["positions"] == torch.tensor([*first, *last])).all()
    assert record.side["positions"].diff(dim=-1).min() > 0
    assert report(chat.answer(QUESTION))["memory"]["missed"] == 0


def test_old_slots_are_never_rounded_again_and_the_pool_gives_all_back(engine):
    local = engine("llama")
    chat = Chat(local)
    chat.build(1)
    before = chat.record()
    chat.step(BLOCKS[1], PROBES[0])
    after = chat.record()
    old = 0
    for layer in range(before.num_layers):
        for head in range(before.k.shape[2]):
            where = {p: i for i, p in enumerate(before.side["positions"][layer, head].tolist())}
            for slot, position in enumerate(after.side["positions"][layer, head].tolist()):
                if position in where:
                    old += 1
                    assert torch.equal(
                        after.k[layer, slot, head], before.k[layer, where[position], head]
                    )
    assert old
    assert after.seen_ids.tolist() == [*PREFIX_IDS, *HISTORY[: 2 * BLOCK]]
    local.settle()


def test_a_question_that_spans_two_episodes_loads_the_best_of_both(engine, oracle):
    local = engine("llama")
    shared, chats, caches = oracle.prefill(PREFIX_IDS), [], []
    for probe in (tokens(PROBE, 50), tokens(PROBE, 51)):
        chat, memory = Chat(local), None
        for number, block in enumerate(BLOCKS[:2]):
            at = PREFIX + number * BLOCK
            prefix = nearer(oracle, shared, memory, at)
            memory = follow(oracle, chat, prefix, memory, block, probe, at)
        chats.append(chat)
        caches.append((memory, chat.record().side["scores"]))
    one, two = chats
    req = one.ask([*one.begin(), *QUESTION], {"load": one.load() + two.load()})
    assert report(req)["memory"] == {"loaded": BUDGET, "missed": 0, "stored": False}
    (a, by_a), (b, by_b) = caches
    best: Any = type(a)([], [], [])
    for layer in range(oracle.layers):
        rows: dict[str, list[Any]] = {"keys": [], "values": [], "positions": []}
        for head in range(oracle.kv_heads):
            found: dict[int, tuple[float, Any, int]] = {}
            for cache, by in ((a, by_a), (b, by_b)):
                for slot, position in enumerate(cache.positions[layer][head].tolist()):
                    score = float(by[layer, head, slot])
                    if position not in found or score > found[position][0]:
                        found[position] = (score, cache, slot)
            order = sorted(found, key=lambda p: (-found[p][0], p))[:BUDGET]
            for name, row in rows.items():
                parts = [
                    getattr(found[p][1], name)[layer][head][found[p][2]] for p in sorted(order)
                ]
                row.append(torch.stack(parts))
        for name, row in rows.items():
            getattr(best, name).append(row)
    at = PREFIX + 2 * BLOCK
    prefix = nearer(oracle, shared, best, at)
    agrees_with_oracle(req, oracle.answer(QUESTION, at, [prefix, best]), 5e-4)


def test_own_tokens_are_all_there_when_the_budget_holds_them(engine):
    chat, own = Chat(engine("llama")), [[PREFIX + 3, PREFIX + 9], [PREFIX + 40, PREFIX + 52]]
    for block, probe in zip(BLOCKS, PROBES, strict=True):
        told = chat.step(block, probe, own, spans=own)
        assert told["stored"]
        assert told["id"] == chat.name
    assert told["kept_share"] == [1.0, 1.0]
    assert report(chat.answer(QUESTION))["memory"]["loaded"] == BUDGET
    positions = chat.record().side["positions"]
    free = BUDGET - 18  # what own tokens leave goes by score, per head
    others = (positions >= PREFIX + 9) & (positions < PREFIX + 40) | (positions >= PREFIX + 52)
    assert (others.sum(-1) + (positions < PREFIX + 3).sum(-1)).unique().tolist() == [free]
