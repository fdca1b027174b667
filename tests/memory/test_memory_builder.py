"""Records are made once, in order, behind the answers."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from conversations import RecordBook, chat

from rag_pipeline.errors import EngineError
from rag_pipeline.memory import Memory, MemoryBuilder, Planner, Utterance
from rag_pipeline.protocol import FUSION_KEY, GenerationRequest

MakePlanner = Callable[..., Planner]
SYSTEM = "Be brief."
LONG = chat(("garden", 12), ("music", 12), ("travel", 12))


@pytest.fixture
def chains(make_planner: MakePlanner) -> Sequence[Any]:
    return make_planner().plan(SYSTEM, LONG, "Where is the hotel?").ahead


@pytest.fixture
def closing() -> Iterator[list[Any]]:
    """Whatever is put in is closed at the end."""
    made: list[Any] = []
    yield made
    for one in made:
        one.close()


def steps_of(book: RecordBook) -> list[GenerationRequest]:
    return [
        request
        for request in book.requests
        if request.fusion.memory is not None and request.fusion.memory.store is not None
    ]


def test_a_chain_is_built_in_order_and_once(chains: Sequence[Any], closing: list[Any]) -> None:
    book = RecordBook()
    closing.append(builder := MemoryBuilder(book))
    assert builder.build(chains[0]).result(30)
    assert list(book.records) == list(chains[0].ids)
    assert builder.build(chains[0]).result(30)
    stats = builder.stats()
    assert stats.steps == len(chains[0]) == len(steps_of(book))
    assert stats.planned_tokens == sum(step.forward_tokens for step in chains[0])
    assert stats.forward_tokens == stats.planned_tokens
    assert stats.probe_tokens == sum(len(step.probe_ids) for step in chains[0])
    assert stats.peak_tokens == max(step.peak_tokens for step in chains[0])


def test_whoever_asks_at_the_same_time_waits_for_the_same_step(
    chains: Sequence[Any], closing: list[Any]
) -> None:
    gate = threading.Event()
    book = RecordBook(before=lambda request: gate.wait(30) and None)
    closing.append(builder := MemoryBuilder(book))
    asked = [builder.build(chains[0], urgent=urgent) for urgent in (False, True, False, True)]
    gate.set()
    assert all(one.result(30) for one in asked)
    assert len(steps_of(book)) == len(chains[0])


def test_records_that_the_engine_has_are_not_built_after_a_restart(
    chains: Sequence[Any], closing: list[Any]
) -> None:
    book = RecordBook()
    closing.append(first := MemoryBuilder(book))
    assert first.build(chains[0]).result(30)
    before = len(book.requests)
    closing.append(
        second := MemoryBuilder(book, existing=lambda ids: [i for i in ids if i in book.records])
    )
    assert second.build(chains[0]).result(30)
    assert len(book.requests) == before


def test_a_record_that_is_lost_is_made_again_from_what_is_left(
    chains: Sequence[Any], closing: list[Any]
) -> None:
    book = RecordBook()
    closing.append(builder := MemoryBuilder(book))
    assert builder.build(chains[0]).result(30)
    for name in chains[0].ids[2:]:
        del book.records[name]
    builder.records.forget(chains[0].ids[-1])
    assert builder.build(chains[0]).result(30)
    assert set(chains[0].ids[-2:]) <= set(book.records)
    assert builder.stats().lost >= 1


def test_an_engine_that_loses_everything_ends_the_chain_and_raises_nothing(
    chains: Sequence[Any], closing: list[Any]
) -> None:
    book = RecordBook()
    book._before = lambda request: book.records.clear()
    closing.append(builder := MemoryBuilder(book))
    assert not builder.build(chains[0]).result(30)


def test_a_step_that_fails_is_counted_and_not_tried_for_ever(
    chains: Sequence[Any],
    closing: list[Any],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level("WARNING", logger="rag_pipeline.memory.builder")

    def refuse(request: GenerationRequest) -> None:
        raise EngineError("the pool is full")

    book = RecordBook(before=refuse)
    closing.append(builder := MemoryBuilder(book))
    assert [builder.build(chains[0]).result(30) for _ in range(5)] == [False] * 5
    assert len(book.requests) == 3
    assert builder.stats().failed == 3
    assert "the pool is full" in caplog.text
    # Later blocks stand behind it: after a rest it is tried again.
    monkeypatch.setattr("rag_pipeline.memory.builder._REST_S", 0.0)
    book._before = None
    assert builder.build(chains[0]).result(30)


def test_builds_stand_behind_answers_but_not_those_that_somebody_waits_for(
    chains: Sequence[Any], closing: list[Any]
) -> None:
    book = RecordBook()
    closing.append(builder := MemoryBuilder(book))
    with builder.answering():
        waiting = builder.build(chains[0])
        assert builder.build(chains[1], urgent=True).result(30)
        assert not waiting.done()
        assert chains[0].ids[-1] not in book.records
    assert waiting.result(30)


def test_closing_drops_what_waits_and_aborts_what_runs(
    chains: Sequence[Any], closing: list[Any]
) -> None:
    started, gate = threading.Event(), threading.Event()

    def wait(request: GenerationRequest) -> None:
        started.set()
        gate.wait(30)

    book = RecordBook(before=wait)
    builder = MemoryBuilder(book)
    running, waiting = builder.build(chains[0]), builder.build(chains[1])
    assert started.wait(30)
    closer = threading.Thread(target=builder.close)
    closer.start()
    assert waiting.result(30) is False
    gate.set()
    closer.join(30)
    assert running.result(30) is False
    assert (book.aborted, book.records) == (1, {})
    assert builder.build(chains[0]).result(1) is False
    builder.close()


def talk(memory: Memory, book: RecordBook, turns: int, closing: list[Any]) -> list[int]:
    """A chat of so many turns; tokens of each prompt."""
    history: list[Utterance] = []
    lengths = []
    for turn in range(turns):
        question = LONG[2 * turn % len(LONG)].text + f" Turn {turn}?"
        with memory.answering():
            prepared = memory.prepare(SYSTEM, history, question)
            meta: dict[str, Any] = {}
            for piece in book.generate(prepared.request):
                meta |= piece.meta_info
            memory.note(prepared, meta)
        lengths.append(len(prepared.request.input_ids))
        history += [Utterance("user", question), LONG[(2 * turn + 1) % len(LONG)]]
        memory.after(SYSTEM, history)
        assert memory.finish(60)
    return lengths


def test_a_chat_is_answered_from_records_of_a_fixed_size(
    make_planner: MakePlanner, closing: list[Any]
) -> None:
    book = RecordBook()
    closing.append(memory := Memory(make_planner(), book))
    lengths = talk(memory, book, 18, closing)
    stats = memory.stats()
    assert stats.answers == 18
    assert (stats.missed, stats.window) == (0, 0)
    assert stats.loaded >= 8
    assert stats.plain == 18 - stats.loaded
    # Prefix, slots, at most two blocks and the question.
    assert max(lengths) <= 20 + 192 + 128 + 60
    assert stats.peak_tokens == max(lengths)
    assert stats.build.peak_tokens <= 20 + 192 + 64 + 128
    assert stats.to_json()["build"]["steps"] == len(steps_of(book))


def test_without_records_an_answer_is_a_window_and_records_are_queued(
    make_planner: MakePlanner, closing: list[Any]
) -> None:
    book = RecordBook()
    exist: Callable[[Sequence[str]], list[str]] = lambda ids: [i for i in ids if i in book.records]  # noqa: E731
    closing.append(memory := Memory(make_planner(), book, existing=exist))
    with memory.answering():
        prepared = memory.prepare(SYSTEM, LONG, "Where is the hotel?")
        assert prepared.candidate == prepared.plan.fallback
    assert memory.finish(60)
    assert memory.prepare(SYSTEM, LONG, "Where is the hotel?").candidate.needs
    stats = memory.stats()
    assert (stats.window, stats.loaded) == (1, 0)


def test_who_waits_gets_the_newest_record(make_planner: MakePlanner, closing: list[Any]) -> None:
    book = RecordBook()
    closing.append(memory := Memory(make_planner(), book))
    prepared = memory.prepare(SYSTEM, LONG, "Where is the hotel?", wait=True)
    assert prepared.candidate.needs
    assert prepared.candidate.tail_len < 64
    assert set(prepared.candidate.needs) <= set(book.records)


def test_a_record_that_is_gone_is_counted_and_made_again(
    make_planner: MakePlanner, closing: list[Any]
) -> None:
    book = RecordBook()
    closing.append(memory := Memory(make_planner(), book))
    memory.prepare(SYSTEM, LONG, "Where is the hotel?", wait=True)
    assert memory.finish(60)
    book.records.clear()
    prepared = memory.prepare(SYSTEM, LONG, "Where is the hotel?")
    meta: dict[str, Any] = {}
    for piece in book.generate(prepared.request):
        meta |= piece.meta_info
    memory.note(prepared, meta)
    assert memory.finish(60)
    stats = memory.stats()
    assert (stats.missed, stats.loaded) == (1, 0)
    assert set(prepared.candidate.needs) <= set(book.records)


def test_a_build_that_fails_leaves_a_window(make_planner: MakePlanner, closing: list[Any]) -> None:
    def refuse(request: GenerationRequest) -> None:
        raise EngineError("no room")

    exist: Callable[[Sequence[str]], list[str]] = lambda ids: []  # noqa: E731
    closing.append(memory := Memory(make_planner(), RecordBook(before=refuse), existing=exist))
    prepared = memory.prepare(SYSTEM, LONG, "Where is the hotel?", wait=True)
    assert prepared.candidate == prepared.plan.fallback


def test_what_cannot_be_planned_is_no_error_behind_an_answer(
    make_planner: MakePlanner, closing: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("WARNING", logger="rag_pipeline.memory.memory")
    closing.append(memory := Memory(make_planner(), RecordBook()))
    memory.after(SYSTEM, [Utterance("tool", "42")])
    assert memory.finish(30)
    assert "role 'tool'" in caplog.text
    memory.close()
    memory.after(SYSTEM, LONG)


def test_one_of_several_who_wait_for_a_record_may_go_away(
    chains: Sequence[Any], closing: list[Any]
) -> None:
    gate = threading.Event()
    book = RecordBook(before=lambda request: gate.wait(30) and None)
    closing.append(builder := MemoryBuilder(book))

    async def ask() -> bool:
        builder.build(chains[1], urgent=True)  # runs, so that the next one waits
        one, two = (
            asyncio.ensure_future(asyncio.wrap_future(builder.build(chains[0], urgent=True)))
            for _ in range(2)
        )
        await asyncio.sleep(0)
        one.cancel()
        await asyncio.sleep(0.01)
        later = asyncio.wrap_future(builder.build(chains[0], urgent=True))
        gate.set()
        return await two and await later

    assert asyncio.run(ask())


def test_a_record_that_exists_elsewhere_alone_is_built(
    make_planner: MakePlanner, closing: list[Any]
) -> None:
    """An engine may name records that this namespace cannot load; a conversation must not be a window for ever."""
    book = RecordBook()
    closing.append(memory := Memory(make_planner(), book, existing=list))
    prepared = memory.prepare(SYSTEM, LONG, "Where is the hotel?")
    assert prepared.candidate.needs
    assert not book.records
    kinds = dict.fromkeys(("exact_prefix_tokens", "reused_tokens", "recomputed_tokens"), 0)
    memory.note(prepared, {FUSION_KEY: {"memory": {"loaded": 0, "missed": 1}, **kinds}})
    assert memory.finish(30)
    assert set(prepared.candidate.needs) <= set(book.records)
    again = memory.prepare(SYSTEM, LONG, "Where is the hotel?")
    assert set(again.candidate.needs) <= set(book.records)


def test_few_histories_wait_to_be_planned(
    make_planner: MakePlanner, closing: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, planned = threading.Event(), []
    closing.append(memory := Memory(make_planner(), RecordBook()))

    def ahead(system: str, history: Sequence[Utterance]) -> tuple[()]:
        gate.wait(30)
        planned.append(history)
        return ()

    monkeypatch.setattr(memory.planner, "ahead", ahead)
    for _ in range(1000):
        memory.after(SYSTEM, LONG)
    gate.set()
    assert memory.finish(30)
    assert 60 < len(planned) < 80
    memory.after(SYSTEM, LONG)
    assert memory.finish(30)
    assert len(planned) < 80
    assert planned[-1] == LONG
