"""The pipeline on a real engine: answers, usage, streaming, async, aborting."""

from __future__ import annotations

import asyncio
import pydoc_data.topics
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from rag_pipeline import Answer, EngineBackend, EngineError, RagPipeline, RagPipelineError
from rag_pipeline.protocol import GenerationRequest, SamplingOptions
from retrievers.types import Chunk, SearchHit

pytestmark = pytest.mark.engine

SHORT = SamplingOptions(max_new_tokens=16)


class WordOverlap:
    """A real, small retriever: shared words between the question and each topic."""

    def __init__(self) -> None:
        names = ("with", "lambda", "for", "import", "yield", "global")
        self.chunks = [
            Chunk(
                id=f"c-{name}",
                document_id=name,
                text=pydoc_data.topics.topics[name][:500].strip(),
                title=name,
                path=f"{name}.txt",
                start=0,
                end=500,
                num_tokens=1,
                metadata={"topic": name},
            )
            for name in names
            if name in pydoc_data.topics.topics
        ]

    def search(
        self, query: str, *, k: int, where: Mapping[str, object] | None = None
    ) -> list[SearchHit]:
        words = set(query.lower().replace("?", "").split())
        found = [
            SearchHit(
                chunk=chunk,
                score=2.0 * (chunk.title in words)
                + len(words & set(chunk.text.lower().split())) / 100,
            )
            for chunk in self.chunks
            if where is None or all(chunk.metadata.get(key) == v for key, v in where.items())
        ]
        return sorted(found, key=lambda hit: -hit.score)[:k]


@pytest.fixture(scope="module")
def pipeline(engine: Any, smollm2_path: Path) -> RagPipeline:
    return RagPipeline(WordOverlap(), EngineBackend(engine), smollm2_path, top_k=2)


def wait_idle(engine: Any) -> None:
    """Until the scheduler runs nothing; fails after a minute."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if engine.flush_cache().success:  # refused while a request runs or waits
            return
        time.sleep(0.1)
    raise AssertionError("the engine did not become idle")


def test_answer_has_sources_usage_and_timings(pipeline: RagPipeline, engine: Any) -> None:
    wait_idle(engine)
    answer = pipeline.ask("What does the with statement do?", sampling=SHORT)
    assert answer.sources[0].id == "c-with"
    assert answer.sources[0].path == "with.txt"
    assert len(answer.sources) == 2
    assert "with" in answer.answer.lower()
    usage = answer.usage
    assert usage.exact_prefix_tokens == 0
    assert usage.fresh_tokens == usage.prompt_tokens > 100
    assert 1 <= usage.completion_tokens <= 16
    assert 0 < answer.timing.ttft_s <= answer.timing.total_s
    # The second question shares the system part; the same question shares nearly all.
    other = pipeline.ask("lambda", sampling=SHORT)
    head = len(pipeline.builder.system_ids)
    assert other.usage.exact_prefix_tokens == head
    again = pipeline.ask("What does the with statement do?", sampling=SHORT)
    assert again.usage.exact_prefix_tokens == again.usage.prompt_tokens - 1
    assert again.sources == answer.sources


def test_text_equals_a_bare_engine_call(pipeline: RagPipeline, engine: Any) -> None:
    question = "What is a lambda expression?"
    wait_idle(engine)
    answer = pipeline.ask(question, sampling=SHORT)
    # Both from an empty tree: behind a cached prefix bf16 rounds differently.
    wait_idle(engine)
    hits = pipeline.retriever.search(question, k=2)
    layout = pipeline.builder.build(question, hits, max_new_tokens=16)
    bare = engine.generate(
        input_ids=list(layout.input_ids),
        sampling_params={"temperature": 0, "max_new_tokens": 16},
    )
    assert answer.answer == bare["text"].strip()
    assert answer.usage.prompt_tokens == bare["meta_info"]["prompt_tokens"]
    assert answer.usage.completion_tokens == bare["meta_info"]["completion_tokens"]


def test_stream_joins_to_the_answer(pipeline: RagPipeline) -> None:
    items = list(pipeline.stream("What does the for statement do?", sampling=SHORT))
    assert isinstance(items[-1], Answer)
    pieces = [item for item in items if isinstance(item, str)]
    assert len(pieces) == len(items) - 1 > 1
    assert "".join(pieces).strip() == items[-1].answer


def test_async_equals_sync_and_runs_at_once(pipeline: RagPipeline, engine: Any) -> None:
    questions = ["What does the with statement do?", "What is lambda?", "What does import do?"]
    wait_idle(engine)
    alone = pipeline.ask(questions[0], sampling=SHORT).answer

    async def all_at_once() -> list[Answer]:
        return await asyncio.gather(
            *(pipeline.aask(question, sampling=SHORT) for question in questions)
        )

    # Two different event loops, one after the other, on the same engine.
    for _ in range(2):
        found = asyncio.run(all_at_once())
        assert [answer.sources[0].id for answer in found] == ["c-with", "c-lambda", "c-import"]
        assert all(answer.answer for answer in found)

    async def streamed() -> list[str | Answer]:
        return [item async for item in pipeline.astream(questions[0], sampling=SHORT)]

    wait_idle(engine)
    items = asyncio.run(streamed())
    assert isinstance(items[-1], Answer)
    assert items[-1].answer == alone


def test_many_threads_share_one_engine(pipeline: RagPipeline) -> None:
    questions = ["What is lambda?", "What does import do?"] * 3
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda q: pipeline.ask(q, sampling=SHORT), questions))
    assert [answer.sources[0].id for answer in found] == ["c-lambda", "c-import"] * 3


def test_chunks_of_a_prompt_are_there_for_the_next(pipeline: RagPipeline, engine: Any) -> None:
    backend = pipeline.backend
    assert isinstance(backend, EngineBackend)
    question = "What do import and global do?"
    pipeline.ask(question, policy="query", sampling=SHORT)
    assert backend.finish_builds(120)
    assert backend.finish_builds(0)  # nothing is left
    wait_idle(engine)
    used = pipeline.ask(question, policy="query", sampling=SHORT).usage
    head = len(pipeline.builder.system_ids)
    chunks = sum(
        len(pipeline.builder.chunk_ids(hit.chunk))
        for hit in pipeline.retriever.search(question, k=2)
    )
    assert used.reused_tokens + used.recomputed_tokens >= chunks - 1
    assert used.exact_prefix_tokens <= head


def test_closing_a_stream_aborts_the_request(pipeline: RagPipeline, engine: Any) -> None:
    long = SamplingOptions(max_new_tokens=2000, stop=(), temperature=1.0)
    # No end token may end it early: the abort must be the reason why the engine is idle soon.
    stream = pipeline.stream("Count to one thousand", sampling=long)
    next(stream)
    stream.close()
    assert not engine.tokenizer_manager.rid_to_state
    wait_idle(engine)

    async def leave_early() -> None:
        items = pipeline.astream("Count to one thousand", sampling=long)
        await anext(items)
        await items.aclose()

    asyncio.run(leave_early())
    assert not engine.tokenizer_manager.rid_to_state
    wait_idle(engine)

    async def cancelled() -> None:
        task = asyncio.create_task(pipeline.aask("Count to one thousand", sampling=long))
        # As soon as the engine has it: a sampled answer may be short.
        while not engine.tokenizer_manager.rid_to_state and not task.done():
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())
    assert not engine.tokenizer_manager.rid_to_state
    assert pipeline.ask("What is lambda?", sampling=SHORT).answer


def test_chunks_that_do_not_fit_are_reported(pipeline: RagPipeline, engine: Any) -> None:
    limit = pipeline.backend.context_length
    assert limit < 8192
    whole = SamplingOptions(max_new_tokens=limit - 250)
    items = pipeline.stream("What does the with statement do?", sampling=whole)
    assert isinstance(next(items), str)  # the engine admits a prompt that fills the context
    items.close()
    # One token more than the engine admits is refused by the engine, in one line.
    request = GenerationRequest(input_ids=(5,) * (limit + 1), sampling=SHORT)
    with pytest.raises(EngineError, match=r"the engine (refused|aborted) the request") as error:
        list(pipeline.backend.generate(request))
    assert "\n" not in str(error.value)
    answer = pipeline.ask(
        "What does the with statement do?", sampling=SamplingOptions(max_new_tokens=4), top_k=6
    )
    assert len(answer.sources) + len(answer.dropped_sources) == 6


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"top_k": 0}, "top_k is 0"),
        ({"policy": "magic"}, "policy 'magic' is unknown"),
        ({"ratio": 0.5}, "takes no ratio"),
    ],
)
def test_bad_parameters_are_one_line(
    pipeline: RagPipeline, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(RagPipelineError) as error:
        pipeline.ask("What is lambda?", **options)
    assert says in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(RagPipelineError, match="question is empty"):
        pipeline.ask("  ")
    with pytest.raises(RagPipelineError, match="the question does not fit"):
        pipeline.ask("why " * 9000)


def test_filter_reaches_the_retriever(pipeline: RagPipeline) -> None:
    answer = pipeline.ask("What is lambda?", where={"topic": "for"}, sampling=SHORT)
    assert [source.id for source in answer.sources] == ["c-for"]
