"""How what a prefill left is found again as a memory: real stores and tiers, KV without a model."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from memory_lives import (
    ACME,
    BUDGET,
    GLOBEX,
    HEADS,
    LAYERS,
    PREFIX,
    Rank,
    Talk,
)

from rag_pipeline.protocol import MemoryFields
from rag_pipeline.protocol.cache_order import CacheOrder
from rag_pipeline.sglang_plugin.fusion.management.memories import memories
from rag_pipeline.sglang_plugin.fusion.memory import keeping
from rag_pipeline.sglang_plugin.fusion.memory.records import kept_shares
from rag_pipeline.sglang_plugin.fusion.request.namespace import RadixNamespace


def test_two_memories_with_own_tokens_are_loaded_as_half_of_each_also_behind_a_restart(
    memory_lives, tmp_path
):
    spans = ((PREFIX, PREFIX + 8),), ((PREFIX + 8, PREFIX + 16),)
    settings = {"store_dir": str(tmp_path / "kv")}
    engine, merged = memory_lives(**settings), []
    talks = [Talk(seed=20 * number, own=own) for number, own in enumerate(spans)]
    for talk in talks:
        talk.step(engine)
        talk.step(engine)
    one, two = talks
    asked = MemoryFields(load=(*one.load, *two.load))
    for life in (engine, None):
        if life is None:
            engine.end()
            life = memory_lives(**settings)
        state = life.state([*one.begin(), 5, 5], asked)
        assert state.memory.loaded == BUDGET
        merged.append(state.spans[0].lease.record.side["positions"])
        state.finish(state.prompt.size)
    assert torch.equal(*merged)
    for (own,) in spans:
        mine = ((merged[0] >= own[0]) & (merged[0] < own[1])).sum(-1)
        assert int(mine.min()) >= BUDGET // 2


def test_another_tenant_prefix_or_placeholder_finds_nothing(memory_lives):
    engine, talk = memory_lives(), Talk()
    talk.step(engine)
    talk.step(engine)
    ids = [*talk.begin(), 5, 5]
    asked = MemoryFields(load=talk.load)

    def loaded(prompt: list[int], tenant: RadixNamespace = ACME) -> int:
        state = engine.state(prompt, asked, tenant)
        state.finish(len(prompt))
        assert state.memory.is_missed == (not state.memory.loaded)
        return state.memory.loaded

    assert loaded(ids) == BUDGET
    assert not loaded(ids, GLOBEX)
    assert not loaded([7, *ids[1:]])
    changed = list(ids)
    changed[PREFIX] += 1
    assert not loaded(changed)


@pytest.mark.parametrize("codec", ["plain", "kivi4"])
def test_a_restart_finds_memories_in_the_folder_and_goes_on_bit_for_bit(
    memory_lives, tmp_path, codec
):
    settings = {"store_dir": str(tmp_path / "kv"), "store_codec": codec}
    first = memory_lives(**settings)
    talk = Talk()
    talk.step(first)
    talk.step(first)
    record = first.found(talk.name)
    first.end()
    second = memory_lives(**settings)
    for key in second.runtime.store.keys():  # noqa: SIM118 - not a mapping
        second.runtime.store.evict(key)  # so that it is fetched
    order = CacheOrder(action="memories", ticket="t", keys=(talk.name, "0" * 64))
    told = memories(second.runtime, order)
    assert told == {"present": [talk.name], "absent": ["0" * 64]}
    talk.step(second)
    assert second.counts()["disk.fetched"] == 1
    assert second.found(talk.name) is not None
    with_old = second.runtime.store
    again = [k for k in with_old.keys() if k == record.key]  # noqa: SIM118 - not a mapping
    with with_old.borrow(again[0]) as back:
        assert torch.equal(back.k, record.k)
        assert torch.equal(back.side["positions"], record.side["positions"])


def test_two_memories_are_loaded_as_the_best_of_both(memory_lives):
    engine = memory_lives()
    one, two = Talk(seed=0), Talk(seed=20)
    for talk in (one, two):
        talk.step(engine)
        talk.step(engine)
    state = engine.state([*one.begin(), 5, 5], MemoryFields(load=(*one.load, *two.load)))
    assert state.memory.loaded == BUDGET
    merged = state.spans[0].lease.record
    records = [engine.found(talk.name) for talk in (one, two)]
    assert merged.base_position == records[0].base_position
    for layer in range(LAYERS):
        for head in range(HEADS):
            best: dict[int, tuple[float, Any]] = {}
            for record in records:
                rows = zip(
                    record.side["positions"][layer, head].tolist(),
                    record.side["scores"][layer, head].tolist(),
                    record.k[layer, :, head],
                    strict=True,
                )
                for position, score, key in rows:
                    if position not in best or score > best[position][0]:
                        best[position] = score, key
            order = sorted(best, key=lambda p, best=best: (-best[p][0], p))[:BUDGET]
            assert merged.side["positions"][layer, head].tolist() == sorted(order)
            wanted = torch.stack([best[p][1] for p in sorted(order)])
            assert torch.equal(merged.layer(layer).k[:, head], wanted)
    state.finish(state.prompt.size)
    # One that is gone takes the other with it: a half is not what was asked for.
    engine.runtime.store.evict(records[1].key)
    state = engine.state([*one.begin(), 5, 5], MemoryFields(load=(*one.load, *two.load)))
    assert state.memory.is_missed
    state.finish(state.prompt.size)


def test_kept_shares_are_those_of_what_is_loaded(memory_lives):
    engine, talk = memory_lives(), Talk(rule="streaming:first=2")
    talk.step(engine)
    talk.step(engine)
    spans = ((PREFIX, PREFIX + 4), (26 - 5, 26), (0, PREFIX))
    state = engine.state([*talk.begin(), 5, 5], MemoryFields(load=talk.load, spans=spans))
    engine.prefill(state)
    assert state.memory.shares == [0.5, 1.0, 0.0]
    state.finish(state.prompt.size)


def test_new_weights_find_no_memory_and_none_is_stored_over_an_update(memory_lives):
    engine, talk = memory_lives(), Talk()
    talk.step(engine)
    engine.runtime.new_weights(in_update=False, tree_is_old=False)
    state = engine.state([*talk.begin(), 5, 5], MemoryFields(load=talk.load))
    assert state.memory.is_missed
    state.finish(state.prompt.size)


def test_ranks_load_and_store_a_memory_together_or_not_at_all(memory_lives, monkeypatch):
    barrier, votes = threading.Barrier(2), [None, None]
    ranks = [memory_lives(group=Rank(rank, barrier, votes)) for rank in range(2)]
    talks = [Talk(), Talk()]

    def both(work: Callable[[int], Any]) -> list[Any]:
        with ThreadPoolExecutor(2) as threads:
            return list(threads.map(work, range(2)))

    def step(rank: int) -> str:
        talks[rank].step(ranks[rank])
        return talks[rank].name

    assert len(set(both(step))) == 1
    assert len(set(both(step))) == 1
    keys = [ranks[rank].found(talks[rank].name).key for rank in range(2)]
    assert keys[0] != keys[1]  # each has its own heads
    # A rank that cannot score takes the other along.
    fine = [set(engine.runtime.store.keys()) for engine in ranks]
    target, original = ranks[1], keeping.keep_top

    def fail(*args: Any) -> Any:
        if threading.current_thread().name.endswith("_1"):
            raise RuntimeError("a fault of the test")
        return original(*args)

    before = [(list(talk.history), talk.name, talk.slots) for talk in talks]
    monkeypatch.setattr(keeping, "keep_top", fail)
    both(step)
    monkeypatch.setattr(keeping, "keep_top", original)
    assert [set(engine.runtime.store.keys()) for engine in ranks] == fine
    for talk, (history, name, slots) in zip(talks, before, strict=True):
        talk.history, talk.name, talk.slots = history, name, slots

    def missed(rank: int) -> bool:
        talk = talks[rank]
        state = ranks[rank].state([*talk.begin(), 5, 5], MemoryFields(load=talk.load))
        state.finish(state.prompt.size)
        return bool(state.memory.is_missed)

    assert both(missed) == [False, False]
    assert target.runtime.store.evict(keys[1])
    assert both(missed) == [True, True]


def test_an_order_names_no_memory_of_other_weights(memory_lives, tmp_path):
    """One folder holds the records of several models, and models of one tokenizer share ids."""
    first = memory_lives(store_dir=str(tmp_path / "kv"))
    talk = Talk()
    talk.step(first)
    first.end()
    order = CacheOrder(action="memories", ticket="t", keys=(talk.name,))
    second = memory_lives(store_dir=str(tmp_path / "kv"))
    assert memories(second.runtime, order)["present"] == [talk.name]
    for key in second.runtime.store.keys():  # noqa: SIM118 - not a mapping
        second.runtime.store.evict(key)
    second.runtime.facts.context_fields["model_fingerprint"] = "v"
    assert memories(second.runtime, order)["present"] == []
    second.runtime.facts.context_fields["model_fingerprint"] = "w"
    second.runtime.epoch = 1
    assert memories(second.runtime, order)["present"] == []


def test_kept_shares_are_counted_as_slot_by_slot():
    draw = torch.Generator().manual_seed(3)
    positions = torch.stack(
        [torch.randperm(60, generator=draw)[:20].sort().values for _ in range(6)]
    )
    positions = positions.to(torch.int32).reshape(2, 3, 20)
    spans = ((0, 60), (10, 11), (5, 40), (59, 2**31 - 1))
    for (a, b), share in zip(spans, kept_shares(positions, spans), strict=True):
        kept = [sum(a <= p < b for p in head) for layer in positions.tolist() for head in layer]
        assert share == pytest.approx(sum(kept) / 6 / (b - a), abs=1e-6)
