"""Memories of a server, on an engine that has room for everything: when they apply, whose they are, who waits for whom."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import time
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from memory_steps import meta_of

from chunk_cache import tenant_mark
from rag_pipeline import ModelTokenizer, RagPipelineError
from rag_pipeline.memory import MemoryConfig, Utterance
from rag_pipeline.opened_memory import Asked
from rag_pipeline.protocol import GenerationPiece, GenerationRequest, SamplingOptions
from rag_pipeline.server import memories as of_server
from rag_pipeline.server.memories import Memories, Remembered
from rag_pipeline.sglang_plugin.http.chat_memory import AskedChat

CONFIG = MemoryConfig(budget_tokens=64, block_tokens=32, episodes=2)
SAMPLING = SamplingOptions(max_new_tokens=4)
ACME, GLOBEX, OPERATOR = (SimpleNamespace(name=n, salt=s) for n, s in (
    ("acme", "salt-a"), ("globex", "salt-g"), ("operator", ""),
))  # fmt: skip


class Engine:
    """Makes every record that it is asked for, one token at a time."""

    context_length = 2048

    def __init__(self) -> None:
        self.salts: list[str | None] = []
        self.orders: list[Any] = []
        self.running = self.most_running = self.given_up = 0
        self.deaf_to: str | None = None
        self.listen: Callable[[dict[str, Any]], None]

    def on_report(self, listen: Callable[[dict[str, Any]], None]) -> None:
        self.listen = listen

    async def generate(
        self, request: GenerationRequest, *, cache_salt: str | None, **others: Any
    ) -> AsyncGenerator[GenerationPiece, None]:
        self.salts.append(cache_salt)
        if cache_salt is not None and cache_salt == self.deaf_to:
            try:
                await asyncio.Event().wait()
            finally:
                self.given_up += 1
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        await asyncio.sleep(0.002)
        self.running -= 1
        yield GenerationPiece(text="x", meta_info=meta_of(request))

    async def order(self, order: Any, *, timeout_s: float) -> dict[str, Any]:
        self.orders.append(order)
        return {"present": [], "absent": list(order.keys)}


def encode(texts: list[str]) -> Any:
    """A direction per text."""
    vectors = np.stack([np.random.default_rng(len(text)).standard_normal(8) for text in texts])
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def told(turns: int) -> tuple[Utterance, ...]:
    said = []
    for turn in range(turns):
        said.append(Utterance("user", f"Question {turn}, about lighthouses?"))
        said.append(Utterance("assistant", f"Answer {turn}: they were painted blue." + "!" * turn))
    return tuple(said)


def asked(turns: int) -> Asked:
    return Asked(system="S.", history=told(turns), question="And?")


@pytest.fixture(scope="module")
def tokenizer(smollm2_path: Path) -> ModelTokenizer:
    return ModelTokenizer.load(smollm2_path)


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def memories(engine: Engine, tokenizer: ModelTokenizer) -> Any:
    pool = SimpleNamespace(get=lambda: SimpleNamespace(encode_queries=encode))

    async def run(tenant: str, function: Callable[[], Any]) -> Any:
        return await asyncio.to_thread(function)

    return Memories(engine, tokenizer, pool, CONFIG, run)  # type: ignore[arg-type]


async def built(turn: Remembered) -> None:
    """Wait until everything behind an answer is there."""
    assert await asyncio.to_thread(turn.memory.finish, 60)


def test_a_default_memory_that_the_context_has_no_room_for_is_refused_before_any_chat(
    engine: Engine, tokenizer: ModelTokenizer
) -> None:
    def check(default: MemoryConfig | None) -> None:
        Memories(engine, tokenizer, None, default, None).check()  # type: ignore[arg-type]

    check(None)
    check(CONFIG)
    with pytest.raises(RagPipelineError, match="needs 3072 tokens, the context has 2048"):
        check(MemoryConfig())


def test_a_short_conversation_is_left_as_it_is_and_a_long_one_waits_for_its_record(
    memories: Memories, engine: Engine
) -> None:
    async def chat() -> None:
        assert await memories.prepare(CONFIG, ACME, asked(1), SAMPLING) is None  # type: ignore[arg-type]
        assert engine.salts == []
        turn = await memories.prepare(CONFIG, ACME, asked(20), SAMPLING)  # type: ignore[arg-type]
        assert turn is not None
        assert turn.fusion.memory is not None
        assert len(turn.input_ids) < 64 + 2 * 32 + 40
        before = len(engine.salts)
        assert before > 0
        # The next turn finds it, and what it needs more is built behind it.
        turn.ended("Yes.")
        await built(turn)
        later = await memories.prepare(CONFIG, ACME, asked(21), SAMPLING)  # type: ignore[arg-type]
        assert later is not None
        assert later.fusion.memory is not None
        await built(later)

    asyncio.run(chat())


def test_records_and_orders_are_in_the_namespace_of_who_asked(
    memories: Memories, engine: Engine
) -> None:
    async def chat() -> None:
        for tenant in (ACME, GLOBEX, OPERATOR):
            turn = await memories.prepare(CONFIG, tenant, asked(12), SAMPLING)  # type: ignore[arg-type]
            assert turn is not None
            await built(turn)
        scope = {"state": {"rag_tenant": ACME}}
        chat = AskedChat(
            wish=None, system="S.", history=tuple((one.role, one.text) for one in told(12)),
            question="And?", max_new_tokens=4, cache_salt="mine", scope=scope, rid="my-id",
        )  # fmt: skip
        turn = await memories.remember(chat)
        assert turn is not None
        assert turn.rid == "my-id"  # an abort by it reaches the request
        await built(turn)

    asyncio.run(chat())
    assert set(engine.salts) == {"salt-a", "salt-g", None, "salt-a/mine"}
    assert {order.tenant for order in engine.orders} == {
        tenant_mark("salt-a"), tenant_mark("salt-g"), "",
    }  # fmt: skip
    assert memories.facts()["memories"] == 4
    assert memories.facts("salt-a")["answers"] == 2
    assert memories.facts("salt-g")["answers"] == 1
    assert "left_alone" not in memories.facts("salt-g")


def test_builds_take_turns_one_step_at_a_time(memories: Memories, engine: Engine) -> None:
    """A long conversation of one tenant does not hold up the first answer of another."""

    async def chat() -> None:
        long = asyncio.create_task(memories.prepare(CONFIG, ACME, asked(60), SAMPLING))  # type: ignore[arg-type]
        while len(engine.salts) < 5:
            await asyncio.sleep(0.001)
        short = await memories.prepare(CONFIG, GLOBEX, asked(12), SAMPLING)  # type: ignore[arg-type]
        assert short is not None
        assert not long.done()
        turn = await long
        assert turn is not None
        await built(turn)
        await built(short)

    asyncio.run(chat())
    assert engine.most_running == 1
    between = [salt for salt in engine.salts if salt == "salt-g"]
    assert between


def test_a_record_that_was_gone_is_counted_and_built_again(
    memories: Memories, engine: Engine
) -> None:
    async def chat() -> None:
        turn = await memories.prepare(CONFIG, ACME, asked(20), SAMPLING)  # type: ignore[arg-type]
        assert turn is not None
        await built(turn)
        before = len(engine.salts)
        engine.listen({"id": "another", "rag_fusion": {"memory": {"missed": 1}}})
        engine.listen({"id": turn.rid, **meta_of(turn.prepared.request), **missed})
        await built(turn)
        assert len(engine.salts) > before
        turn.ended(None)
        deadline = time.monotonic() + 30
        while memories.facts()["missed"] != 1:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)

    kinds = dict.fromkeys(("exact_prefix_tokens", "reused_tokens", "recomputed_tokens"), 0)
    missed = {"rag_fusion": {"memory": {"loaded": 0, "missed": 1}, **kinds}}
    asyncio.run(chat())
    assert memories.facts()["loaded"] == 0


def test_one_tenant_of_many_configurations_takes_no_other_tenants_memory(
    memories: Memories, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(of_server, "MOST_MEMORIES", 4)

    async def chat() -> None:
        first = await memories.prepare(CONFIG, GLOBEX, asked(12), SAMPLING)  # type: ignore[arg-type]
        assert first is not None
        for slots in range(64, 72):
            config = dataclasses.replace(CONFIG, budget_tokens=slots)
            await memories.prepare(config, ACME, asked(12), SAMPLING)  # type: ignore[arg-type]
        again = await memories.prepare(CONFIG, GLOBEX, asked(12), SAMPLING)  # type: ignore[arg-type]
        assert again is not None
        assert again.memory is first.memory

    asyncio.run(chat())
    assert memories.facts()["memories"] == 4
    memories.close()


def test_turns_are_of_tenants_however_many_configurations_one_has(
    memories: Memories, engine: Engine
) -> None:
    """While eight memories of one tenant are built, every second step is another tenant's."""

    async def chat() -> None:
        many = [
            asyncio.create_task(
                memories.prepare(  # type: ignore[arg-type]
                    dataclasses.replace(CONFIG, budget_tokens=slots), ACME, asked(60), SAMPLING
                )
            )
            for slots in range(64, 72)
        ]
        while len(engine.salts) < 40:
            await asyncio.sleep(0.001)
        turn = await memories.prepare(CONFIG, GLOBEX, asked(30), SAMPLING)  # type: ignore[arg-type]
        assert turn is not None
        places = [place for place, salt in enumerate(engine.salts) if salt == "salt-g"]
        between = [b - a for a, b in itertools.pairwise(places)]
        assert len(between) > 4
        assert sorted(between)[len(between) // 2] <= 3
        memories.close()
        await asyncio.gather(*many)

    asyncio.run(chat())


def test_a_step_that_the_engine_never_ends_is_given_up_and_holds_no_other_tenant(
    memories: Memories, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(of_server, "STEP_S", 0.2)
    engine.deaf_to = "salt-a"

    async def chat() -> None:
        stuck = asyncio.create_task(memories.prepare(CONFIG, ACME, asked(20), SAMPLING))  # type: ignore[arg-type]
        while not engine.salts:
            await asyncio.sleep(0.001)
        turn = await memories.prepare(CONFIG, GLOBEX, asked(20), SAMPLING)  # type: ignore[arg-type]
        assert turn is not None
        assert turn.fusion.memory is not None
        window = await stuck
        assert window is not None
        assert window.fusion.memory is None  # who waited has a window
        await built(turn)

    asyncio.run(chat())
    assert memories.facts("salt-a")["build_failed"] == engine.given_up > 0
    assert memories.facts("salt-g")["build_failed"] == 0


def test_reports_that_never_come_are_not_waited_for_without_end(
    memories: Memories, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(of_server, "_UNDER_WAY", 3)

    async def chat() -> None:
        for _ in range(6):
            assert await memories.prepare(CONFIG, ACME, asked(12), SAMPLING) is not None  # type: ignore[arg-type]

    asyncio.run(chat())
    assert len(memories._under_way) == 3
    memories.close()


def test_a_server_that_stops_begins_no_step_and_waits_for_none(
    memories: Memories, engine: Engine
) -> None:
    """SGLang's shutdown waits until the engine has nothing to do, and is killed where that never comes."""

    async def chat() -> None:
        building = asyncio.create_task(memories.prepare(CONFIG, ACME, asked(60), SAMPLING))  # type: ignore[arg-type]
        other = asyncio.create_task(memories.prepare(CONFIG, GLOBEX, asked(60), SAMPLING))  # type: ignore[arg-type]
        while len(engine.salts) < 5:
            await asyncio.sleep(0.001)
        memories.close()
        at = len(engine.salts)
        await asyncio.gather(building, other)
        await asyncio.sleep(0.05)
        assert len(engine.salts) <= at + 1

    asyncio.run(chat())
