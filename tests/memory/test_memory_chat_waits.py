"""What a chat waits for before it answers from a memory: no more than a server does."""

from __future__ import annotations

from collections.abc import Callable, Generator
from pathlib import Path

import pytest
from conversations import chat
from memory_steps import meta_of

from rag_pipeline import chat_session
from rag_pipeline.chat_session import ChatSession
from rag_pipeline.memory import Memory, MemoryConfig, Planner
from rag_pipeline.protocol import GenerationPiece, GenerationRequest

LONG = chat(("garden", 12), ("music", 12), ("travel", 12), ("garden", 6))
QUESTION = "The violin in the garden?"


class Backend:
    """Stores whatever it is asked to, and answers with one word."""

    context_length = 4096

    def __init__(self) -> None:
        self.stored: list[str] = []
        self.answers: list[tuple[list[str], list[str]]] = []

    def generate(self, request: GenerationRequest) -> Generator[GenerationPiece, None, None]:
        meta = meta_of(request)
        memory = request.fusion.memory
        if memory is not None and memory.store is not None:
            self.stored.append(meta["rag_fusion"]["memory"]["id"])
        else:
            loads = [] if memory is None else [one.id for one in memory.load]
            self.answers.append((loads, list(self.stored)))
        yield GenerationPiece(text="Yes.", meta_info=meta)

    def close(self) -> None:
        pass


def test_a_long_chat_that_is_new_waits_for_the_fewest_records(
    make_planner: Callable[..., Planner], smollm2_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planner, backend = make_planner(merge_margin=2.0), Backend()
    both, one = planner.plan("", LONG, QUESTION).candidates[:2]
    assert len(both.needs) == 2
    assert len(one.needs) == 1
    monkeypatch.setattr(chat_session, "open_memory", lambda *given: Memory(planner, backend))
    said = [(message.role, message.text) for message in LONG]
    with ChatSession(backend, smollm2_path, memory=MemoryConfig(), messages=said) as session:  # type: ignore[arg-type]
        assert "".join(session.ask(QUESTION)) == "Yes."
    loads, stored = backend.answers[0]
    assert loads == list(one.needs)
    assert set(loads) <= set(stored)
    assert not set(both.needs) <= set(stored)
