"""A conversation's memory of fixed size through the real engine, against the algorithm written out in torch."""

from __future__ import annotations

import dataclasses
import json
import time
from typing import Any

import pytest
import torch
from fusion_helpers import PREFIX, PREFIX_IDS, agrees_with_oracle, chunk_limit, report, tokens
from memory_oracle import MemoryOracle

from rag_pipeline.protocol import memory_id
from rag_pipeline.protocol.cache_order import CacheOrder
from rag_pipeline.sglang_plugin.fusion.management.desk import CacheDesk
from rag_pipeline.sglang_plugin.fusion.memory.records import name_of

BLOCK, BUDGET, PROBE, STEPS = 32, 20, 11, 4
HISTORY = tokens(BLOCK * STEPS, 41)
BLOCKS = [HISTORY[i : i + BLOCK] for i in range(0, len(HISTORY), BLOCK)]
PROBES = [tokens(PROBE, 50)] * STEPS
QUESTION = tokens(9, 2)


class Chat:
    """One conversation's memory, built step by step in an engine."""

    def __init__(self, local: Any, *, budget: int = BUDGET, rule: str = "epicache", **fields: Any):
        self.local, self.budget, self.rule, self.fields = local, budget, rule, fields
        self.prefix = PREFIX_IDS
        self.name, self.slots, self.seen = "", 0, 0
        self.history: list[int] = []

    def load(self) -> list[dict[str, Any]]:
        if not self.name:
            return []
        start = len(self.prefix)
        return [{"start": start, "end": start + self.slots, "id": self.name}]

    def begin(self) -> list[int]:
        """Prefix and placeholders: the last tokens of the history."""
        return [*self.prefix, *(self.history[-self.slots :] if self.slots else [])]

    def step(
        self, block: list[int], probe: list[int], own: list[list[int]] | None = None, **asked: Any
    ) -> dict[str, Any]:
        ids = [*self.begin(), *block]
        store = {"end": len(ids), "budget": self.budget, "rule": self.rule}
        if own:
            store["own"] = own
        memory = {"store": store, **asked} | ({"load": self.load()} if self.name else {})
        req = self.ask([*ids, *probe], memory, 1)
        pairs = [(start, end) for start, end in own or ()]
        wanted = memory_id(self.name, self.prefix, block, probe, self.rule, self.budget, pairs)
        self.history += block
        self.slots = min(self.budget, self.slots + len(block))
        self.name = wanted
        return report(req)["memory"]

    def ask(self, ids: list[int], memory: dict[str, Any], new: int = 4, **fields: Any) -> Any:
        fusion = {"prefix_len": len(self.prefix), "memory": json.dumps(memory)}
        return self.local.ask(ids, new, fusion=fusion, top=20, **(self.fields | fields))

    def answer(self, question: list[int], **asked: Any) -> Any:
        return self.ask([*self.begin(), *question], {"load": self.load(), **asked})

    def record(self) -> Any:
        """What the store holds under the name of the last step."""
        store = self.local.runtime.store
        for key in store.keys():  # noqa: SIM118 - not a mapping
            with store.borrow(key) as record:
                if record is not None and name_of(record) == self.name:
                    assert record.token_ids.tolist() == self.history[-self.slots :]
                    return record
        return None

    def build(self, steps: int = STEPS) -> list[dict[str, Any]]:
        return [self.step(b, p) for b, p in zip(BLOCKS[:steps], PROBES, strict=False)]


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


def test_memory_and_pool_stay_flat_while_the_conversation_grows(engine):
    local = engine("llama")

    def highest(blocks: int) -> tuple[int, int]:
        """Most slots of the pool that could not be given back, and bytes of the largest record."""
        local.fresh()
        chat, most, largest = Chat(local), 0, 0
        scheduler = local.scheduler
        original = scheduler.process_batch_result

        def watch(*args: Any, **kwargs: Any) -> Any:
            nonlocal most
            free = scheduler.token_to_kv_pool_allocator.available_size()
            kept = scheduler.tree_cache.evictable_size()
            most = max(most, scheduler.max_total_num_tokens - free - kept)
            return original(*args, **kwargs)

        scheduler.process_batch_result = watch
        try:
            for number in range(blocks):
                told = chat.step(tokens(BLOCK, 200 + number), PROBES[0])
                assert told["kept"] <= BUDGET
                record = chat.record()
                largest = max(largest, int(record.k.nbytes + record.v.nbytes))
        finally:
            scheduler.process_batch_result = original
        return most, largest

    one, two = highest(4), highest(8)
    assert two[0] <= one[0] * 1.01
    assert two[1] == one[1]
    assert one[0] <= PREFIX + BUDGET + BLOCK + PROBE + 2


def test_nobody_else_and_nothing_else_finds_a_record(engine):
    local = engine("llama")
    chat = Chat(local, cache_salt="acme")
    chat.build(2)

    def missed(**changed: Any) -> int:
        other = Chat(local, cache_salt=changed.pop("cache_salt", "acme"))
        other.name, other.slots, other.history = chat.name, chat.slots, list(chat.history)
        for name, value in changed.items():
            setattr(other, name, value)
        told = report(other.answer(QUESTION))["memory"]
        assert told["missed"] == (0 if told["loaded"] else 1)
        return told["missed"]

    assert not missed()
    assert missed(cache_salt="globex")
    assert missed(prefix=[*PREFIX_IDS[:-1], 7])
    assert missed(prefix=PREFIX_IDS[:-1])
    assert missed(history=[*chat.history[:-1], 7])
    assert missed(slots=chat.slots - 1)
    block, probe = BLOCKS[1], PROBES[1]
    first = memory_id("", PREFIX_IDS, BLOCKS[0], PROBES[0], "epicache", BUDGET)
    same = ("epicache", BUDGET)
    assert not missed(name=memory_id(first, PREFIX_IDS, block, probe, *same))
    for changed in (
        memory_id(first, PREFIX_IDS, block, probe, "epicache", BUDGET + 1),
        memory_id(first, PREFIX_IDS, block, probe, "keydiff", BUDGET),
        memory_id(first, PREFIX_IDS, block, [*probe, 7], *same),
        memory_id(first, PREFIX_IDS, [*block[:-1], 7], probe, *same),
        memory_id(chat.name, PREFIX_IDS, block, probe, *same),
    ):
        assert missed(name=changed)


def test_a_missing_record_is_a_sliding_window_and_nothing_is_made_of_it(engine):
    local = engine("llama")
    chat = Chat(local)
    chat.build(2)
    local.runtime.store.clear()
    told = chat.step(BLOCKS[2], PROBES[2])
    assert told == {"loaded": 0, "missed": 1, "stored": False}
    assert local.runtime.metrics.to_json()["memories.missed"] == 1
    assert not local.runtime.store.keys()
    chat.slots, chat.history = BUDGET, HISTORY[: 2 * BLOCK]
    one = chat.answer(QUESTION)
    assert report(one)["memory"]["missed"] == 1
    window = local.ask([*chat.begin(), *QUESTION], 4, fusion={"mode": "off"}, top=20)
    assert list(one.output_ids) == list(window.output_ids)
    # The window is in the tree now; a record never gives way to it.
    chat = Chat(local)
    chat.build(2)
    assert report(chat.answer(QUESTION))["memory"]["loaded"] == BUDGET
    assert report(chat.answer(QUESTION))["exact_prefix_tokens"] <= PREFIX


def test_a_record_that_is_there_is_not_made_again(engine):
    local = engine("llama")
    chat = Chat(local)
    chat.build(2)
    again = Chat(local)
    assert [told["stored"] for told in again.build(2)] == [True, True]
    counts = local.runtime.metrics.to_json()
    assert (counts["memories.stored"], counts["memories.known"]) == (2, 2)
    assert again.name == chat.name


def test_a_request_is_told_which_share_of_its_spans_is_kept(engine):
    local = engine("llama")
    chat = Chat(local, rule="streaming:first=2")
    edge = PREFIX + 2 * BLOCK
    spans = [[PREFIX, PREFIX + 4], [edge - 10, edge], [edge - 36, edge]]
    chat.build(1)
    told = chat.step(BLOCKS[1], PROBES[0], spans=spans)
    assert told["kept_share"] == [0.5, 1.0, 0.5]
    told = report(chat.answer(QUESTION, spans=spans))["memory"]
    assert told["kept_share"] == [0.5, 1.0, 0.5]


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


def test_a_fault_of_the_pass_leaves_no_record_and_the_usual_answer(engine, monkeypatch):
    from rag_pipeline.sglang_plugin.fusion.forward import loader

    local = engine("llama")
    chat = Chat(local)
    chat.build(1)
    stored = len(local.runtime.store)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("a fault of the test")

    with monkeypatch.context() as patched:
        patched.setattr(loader.Loader, "ensure", fail)
        told = chat.step(BLOCKS[1], PROBES[1])
    assert told == {"loaded": 0, "missed": 1, "stored": False}
    assert len(local.runtime.store) == stored
    local.runtime.pass_succeeded()


def test_other_requests_of_a_batch_are_not_changed_by_a_step(engine):
    local = engine("llama")
    chat = Chat(local)
    chat.build(1)
    other = tokens(50, 77)
    alone = local.ask(other, 4, fusion={"mode": "off"})
    local.flush()
    ids = [*chat.begin(), *BLOCKS[1]]
    memory = {
        "load": chat.load(),
        "store": {"end": len(ids), "budget": BUDGET, "rule": "epicache"},
    }
    fusion = {"prefix_len": PREFIX, "memory": json.dumps(memory)}
    beside = local.submit(other, 4, fusion={"mode": "off"})
    step = local.submit([*ids, *PROBES[1]], 1, fusion=fusion)
    plain = local.submit(tokens(40, 78), 2)
    local.run(beside, step, plain)
    assert report(step)["memory"]["stored"]
    assert list(beside.output_ids) == list(alone.output_ids)
    assert "rag_fusion" not in (plain.customized_info or {})


def test_a_restart_finds_what_was_written_and_erased_text_goes(engine, monkeypatch, tmp_path):
    from rag_pipeline.sglang_plugin.fusion.builds import persistence

    local = engine("llama")
    runtime = local.runtime
    for name in ("tiers", "fetcher", "erased", "timeline"):
        monkeypatch.setattr(runtime, name, None)
    config = dataclasses.replace(
        runtime.config, store_dir=str(tmp_path / "kv"), store_codec="kivi4"
    )
    monkeypatch.setattr(runtime, "config", config)
    persistence.start_tiers(runtime, "no-model")
    try:
        chat = Chat(local)
        chat.build(2)
        record, usual = chat.record(), chat.answer(QUESTION)
        assert runtime.tiers.drain(60)
        desk = CacheDesk(runtime)

        def there(*names: str, **fields: Any) -> list[str]:
            order = CacheOrder(
                action="memories", ticket=f"{time.monotonic_ns()}", keys=names, **fields
            )
            answer = desk.take(order)
            while not answer["done"]:
                time.sleep(0.01)
                answer = desk.take(order)
            return answer["result"]["present"]

        assert there(chat.name, "0" * 64) == [chat.name]
        local.fresh()  # memory has nothing any more
        assert there(chat.name) == [chat.name]
        assert there(chat.name, tenant="somebody") == []
        again = chat.answer(QUESTION)
        assert report(again)["memory"]["loaded"] == BUDGET
        assert list(again.output_ids) == list(usual.output_ids)
        back = chat.record()
        assert torch.equal(back.k, record.k)  # lossless, whatever the folder's codec
        assert chat.step(BLOCKS[2], PROBES[2])["stored"]
        # A slot's KV holds something of all tokens before it, its own ids may be others.
        assert runtime.tiers.drain(60)
        seen: list[list[int]] = []
        runtime.erased._is_erased = lambda ids, tenant: bool(seen.append(ids.tolist()))
        runtime.erased.is_in(chat.record(), "")
        assert seen == [[*PREFIX_IDS, *HISTORY[: 3 * BLOCK]]]
    finally:
        assert runtime.fetcher.close(60)
        assert runtime.tiers.close(60)
        local.fresh()
