"""Memories of conversations in the life of an engine: tenants, restarts, faults, batches and room."""

from __future__ import annotations

import dataclasses
import json
import time
from typing import Any

import pytest
import torch
from fusion_helpers import PREFIX, PREFIX_IDS, report, tokens
from memory_chats import BLOCK, BLOCKS, BUDGET, HISTORY, PROBE, PROBES, QUESTION, Chat

from rag_pipeline.protocol import memory_id
from rag_pipeline.protocol.cache_order import CacheOrder
from rag_pipeline.sglang_plugin.fusion.management.desk import CacheDesk


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


@pytest.mark.parametrize("first", [True, False], ids=["first", "second"])
def test_an_answer_keeps_its_memory_beside_a_request_that_forbids_fusion(engine, first):
    """Another's request in the same batch must not make an answer forget its conversation: one waits for the next batch."""
    local = engine("llama")
    chat = Chat(local)
    chat.build(2)
    wanted = list(chat.answer(QUESTION).output_ids)
    local.flush()
    memory = {"load": chat.load()}
    fusion = {"prefix_len": PREFIX, "memory": json.dumps(memory)}
    req = local.submit([*chat.begin(), *QUESTION], 4, fusion=fusion)
    alone = local.submit(tokens(30, 40), 4, return_logprob=False)
    alone.return_hidden_states = True
    if first:
        local.scheduler.waiting_queue.reverse()
    local.run(req, alone)
    assert report(req)["memory"]["loaded"] == BUDGET
    assert list(req.output_ids) == wanted
    local.settle()
    local.runtime.store.check_integrity(expect_idle=True)
