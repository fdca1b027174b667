"""Prompts of long conversations through the doors of the pipeline, without an engine: layout, waiting, what is told."""

from __future__ import annotations

from collections.abc import Generator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from memory_steps import meta_of

from rag_pipeline import PromptBuilder, RagPipeline, RagPipelineError
from rag_pipeline.memory import Memory, MemoryConfig, Planner, Utterance
from rag_pipeline.opened_memory import Asked, plan_turn, prepare_turn
from rag_pipeline.prompts.chunk_message import lay_out_message, write_message
from rag_pipeline.prompts.history import HistoryMessage
from rag_pipeline.prompts.segments import SegmentEncoder
from rag_pipeline.prompts.whole_chat import whole_chat
from rag_pipeline.protocol import (
    FUSION_KEY,
    GenerationPiece,
    GenerationRequest,
    SamplingOptions,
)
from retrievers import Chunk, SearchHit

CONFIG = MemoryConfig(method="streaming", budget_tokens=64, block_tokens=32, episodes=1)
SAMPLING = SamplingOptions(max_new_tokens=8)


class Backend:
    """Stores whatever it is asked to, and answers with one word."""

    context_length = 1024

    def __init__(self) -> None:
        self.steps = 0

    def generate(self, request: GenerationRequest) -> Generator[GenerationPiece, None, None]:
        memory = request.fusion.memory
        self.steps += memory is not None and memory.store is not None
        yield GenerationPiece(text="Yes.", meta_info=meta_of(request))

    async def agenerate(self, request: GenerationRequest) -> Any:
        for piece in self.generate(request):
            yield piece

    def close(self) -> None:
        pass


class Hits:
    """Finds two chunks, whatever is asked."""

    def search(self, query: str, *, k: int, where: object = None) -> list[SearchHit]:
        return [hit("one"), hit("two")]


def hit(name: str) -> SearchHit:
    text = f"Fact {name}, told at length."
    chunk = Chunk(
        id=name,
        document_id=name,
        title=name.title(),
        text=text,
        start=0,
        end=len(text),
        num_tokens=0,
    )
    return SearchHit(chunk=chunk, score=1.0)


def talk(turns: int) -> list[dict[str, str]]:
    said = []
    for turn in range(turns):
        said.append({"role": "user", "content": f"Question {turn}, about lighthouses?"})
        said.append({"role": "assistant", "content": f"Answer {turn}: they were painted blue."})
    return said


def told(turns: int) -> tuple[Utterance, ...]:
    return tuple(Utterance(said["role"], said["content"]) for said in talk(turns))


@pytest.fixture
def builder(smollm2_path: Path) -> PromptBuilder:
    return PromptBuilder(smollm2_path, context_length=1024)


@pytest.fixture
def memory(builder: PromptBuilder) -> Any:
    planner = Planner(CONFIG, builder.tokenizer, lambda texts: None, context_length=1024)  # type: ignore[arg-type, return-value]
    with Memory(planner, Backend()) as made:
        yield made


def test_a_message_holds_its_chunks_and_their_places_are_found(builder: PromptBuilder) -> None:
    message = write_message(
        builder, " Which? ", [hit("one"), hit("two")], max_new_tokens=8, context_length=1024,
        told_tokens=100, rules="Rhyme.",
    )  # fmt: skip
    assert message.text == (
        "Text:\n\nOne\nFact one, told at length.\n\nTwo\nFact two, told at length.\n\n"
        "Rhyme.\n\nQuestion: Which?\nAnswer in one sentence."
    )
    before = tuple(builder.tokenizer.encode("and so on and so forth"))
    ids = (*before, *builder.tokenizer.encode_runs([(message.text, False), *builder.closing]))
    layout = lay_out_message(builder, message, ids)
    decode = builder.tokenizer.decode
    texts = [decode(ids[span.start : span.end]) for span in layout.chunk_spans]
    assert texts == [
        "One\nFact one, told at length.\n\n",
        "Two\nFact two, told at length.\n\n",
    ]
    edges = [layout.system_span, *layout.chunk_spans, layout.question_span]
    assert edges[0].start == 0
    assert edges[-1].end == len(ids)
    assert all(a.end == b.start for a, b in pairwise(edges))


def test_chunks_that_have_no_room_beside_the_history_are_dropped(builder: PromptBuilder) -> None:
    message = write_message(
        builder, "Which?", [hit("one"), hit("two")], max_new_tokens=8, context_length=200,
        told_tokens=170,
    )  # fmt: skip
    assert message.chunks == ()
    assert [one.chunk.id for one in message.dropped] == ["one", "two"]
    assert message.text == builder.asked("Which?")


def test_a_short_conversation_needs_no_memory_and_a_new_long_one_waits(memory: Any) -> None:
    short = Asked(system="S.", history=told(2), question="And?")
    assert plan_turn(memory, short, SAMPLING) is None
    long = Asked(system="S.", history=told(20), question="And?")
    planned = plan_turn(memory, long, SAMPLING)
    assert planned is not None
    assert planned.missing
    assert all(build.result(60) for build in planned.build())
    again = plan_turn(memory, long, SAMPLING)
    assert again is not None
    assert again.missing == ()
    turn = prepare_turn(planned, SAMPLING)
    assert turn.fusion.memory is not None
    assert len(turn.input_ids) < CONFIG.most_told_tokens + 40
    facts = turn.facts({FUSION_KEY: {"memory": {"loaded": 64, "missed": 0}}})
    assert facts["slots"] == facts["loaded"] == 64
    assert facts["history_tokens"] > 400


def test_the_pipeline_answers_a_long_history_from_its_memory(builder: PromptBuilder) -> None:
    backend = Backend()
    with RagPipeline(Hits(), backend, builder, memory=CONFIG) as pipeline:  # type: ignore[arg-type]
        short = pipeline.ask("Which?", history=talk(2))
        assert short.memory is None
        assert "memory" not in short.to_json()
        answer = pipeline.ask("Which?", history=talk(20))
        assert answer.memory is not None
        assert answer.memory["loaded"] == answer.memory["slots"] == 64
        assert answer.to_json()["memory"] == answer.memory
        assert [source.id for source in answer.sources] == ["one", "two"]
        assert pipeline.ask("Which?", history=talk(20), memory="off").memory is None
        assert backend.steps > 5


@pytest.mark.parametrize("wrong", ["elephant", {"budget": 3}, {"budget_tokens": 3}])
def test_a_memory_that_cannot_be_is_refused_before_anything_is_done(
    wrong: Any, builder: PromptBuilder
) -> None:
    with pytest.raises(RagPipelineError):
        RagPipeline(Hits(), Backend(), builder, memory=wrong)  # type: ignore[arg-type]
    pipeline = RagPipeline(Hits(), Backend(), builder)  # type: ignore[arg-type]
    with pytest.raises(RagPipelineError):
        pipeline.ask("Which?", memory=wrong)


def test_a_whole_chat_loses_its_oldest_turns_and_no_message_is_cut(smollm2_path: Path) -> None:
    from rag_pipeline import ModelTokenizer

    encoder = SegmentEncoder(ModelTokenizer.load(smollm2_path))
    history = [HistoryMessage.read(said) for said in talk(30)]
    ids, cut = whole_chat(
        encoder, "Be brief.", history, "And?", max_new_tokens=16, context_length=400
    )
    text = encoder.tokenizer.decode(ids)
    assert len(ids) <= 400 - 16
    assert cut.turns > 0
    assert text.startswith("<|im_start|>system\nBe brief.")
    assert f"Question {cut.turns}," in text
    assert f"Question {cut.turns - 1}," not in text
    assert text.endswith("And?<|im_end|>\n<|im_start|>assistant\n")
    with pytest.raises(RagPipelineError, match="the message does not fit"):
        whole_chat(encoder, "", [], "word " * 500, max_new_tokens=16, context_length=400)
