"""A chat that grows past its budget on a real engine."""

from __future__ import annotations

from typing import Any

import pytest
from conversations import chat

from rag_pipeline import EngineBackend
from rag_pipeline.memory import Memory, MemoryConfig, Planner, Utterance
from rag_pipeline.prompts.tokenizer import ModelTokenizer
from rag_pipeline.protocol import SamplingOptions, fusion_report, memory_report

pytestmark = pytest.mark.engine

SYSTEM = "Be brief."
BUDGET, BLOCK, PROBE = 128, 64, 64
RECORD = BUDGET // 2
SAID = chat(("garden", 8), ("music", 8), ("travel", 8))
SHORT = SamplingOptions(max_new_tokens=8)


def ask(memory: Memory, backend: Any, history: list[Utterance], question: str) -> dict[str, Any]:
    """What the engine reports of the memory; empty for a prompt without one."""
    meta: dict[str, Any] = {}
    with memory.answering():
        prepared = memory.prepare(SYSTEM, history, question, sampling=SHORT)
        for piece in backend.generate(prepared.request):
            meta |= piece.meta_info
        memory.note(prepared, meta)
    return dict(memory_report(fusion_report(meta)))


def test_twelve_turns_are_answered_from_records_of_one_size(
    engine: Any, tokenizer: ModelTokenizer, encode: Any
) -> None:
    config = MemoryConfig(budget_tokens=BUDGET, block_tokens=BLOCK, probe_tokens=PROBE, episodes=2)
    backend = EngineBackend(engine)
    engine.flush_cache()

    def planner() -> Planner:
        return Planner(config, tokenizer, encode, context_length=backend.context_length)

    with Memory(planner(), backend) as memory:
        for turn in range(0, len(SAID), 2):
            ask(memory, backend, SAID[:turn], SAID[turn].text)
            memory.after(SYSTEM, SAID[: turn + 2])
            assert memory.finish(120)
        told = ask(memory, backend, SAID, "What did I plant in the raised bed?")
        assert (told["loaded"], told["missed"]) == (RECORD, 0)
        stats = memory.stats()
        assert (stats.missed, stats.window, stats.build.failed, stats.build.lost) == (0, 0, 0, 0)
        assert stats.loaded + stats.plain == len(SAID) // 2 + 1
        assert stats.loaded > stats.plain
        # Prefix, slots, fewer than two blocks and the question; slots, block and probe.
        assert stats.peak_tokens < 20 + BUDGET + 2 * BLOCK + 40
        assert stats.build.peak_tokens <= 20 + BUDGET + BLOCK + PROBE
        # A step computes its block and its probe: the record before was loaded, not prefilled.
        assert stats.build.forward_tokens <= stats.build.planned_tokens + 20 * stats.build.steps
    with Memory(planner(), backend) as restarted:
        told = ask(restarted, backend, SAID, "What did I plant in the raised bed?")
        assert (told["loaded"], told["missed"]) == (RECORD, 0)
