"""``rag-pipeline ask``: a question, an index, an answer with sources, usage and timings."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rag_pipeline.cli.common import open_index, resolve_llm_shown
from rag_pipeline.cli.console import emit_json, say, step, write, write_error
from rag_pipeline.errors import RagPipelineError
from rag_pipeline.prompts.document_order import check_document_order
from rag_pipeline.protocol import FusionChoice

if TYPE_CHECKING:
    from rag_pipeline import Answer, RagPipeline
    from rag_pipeline.generation import Backend
    from rag_pipeline.server.attribution import Attribution
    from retrievers import Index
    from retrievers.types import Retriever

BUILD_WAIT_S = 60.0
"""Longest wait for chunks to be computed behind an answer."""

SEARCHES = ("dense", "bm25", "hybrid")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AskOptions:
    """Options of the command, as parsed."""

    question: str
    index: Path
    model: str
    server: str | None = None
    embedder: str | None = None
    search: str = "dense"
    top_k: int = 4
    policy: str = "prefix"
    ratio: float | None = None
    attention: str = ""
    document_order: str = "retrieved"
    store: Path | None = None
    max_new_tokens: int = 128
    stream: bool = False

    @property
    def fusion(self) -> FusionChoice:
        """Policy, ratio and attention."""
        return FusionChoice.of(self)


def run_ask(options: AskOptions, *, json_output: bool) -> None:
    """Run the command: everything that can be refused is refused before the engine starts."""
    if not options.question.strip():
        raise RagPipelineError("the question is empty; give at least one word")
    with open_pipeline(options) as pipeline:
        answer = ask_shown(pipeline, options, json_output=json_output)
        if json_output:
            emit_json(answer.to_json())
        else:
            print_answer(answer, with_text=not options.stream)
        _keep_chunks(pipeline, options)


def _keep_chunks(pipeline: RagPipeline, options: AskOptions) -> None:
    """Let an engine of our own compute the KV of this prompt's chunks before it is closed."""
    from rag_pipeline import EngineBackend

    if options.fusion.is_exact or not isinstance(pipeline.backend, EngineBackend):
        return
    if pipeline.backend.finish_builds(0):
        return
    with step("Keeping the chunks' KV for the next question"):
        done = pipeline.backend.finish_builds(BUILD_WAIT_S)
    if not done:
        say("some chunks were left out; `rag-pipeline cache warm` computes them all")


def ask_shown(pipeline: RagPipeline, options: AskOptions, *, json_output: bool) -> Answer:
    """Ask; with ``--stream`` pieces are printed as they come (to stderr beside ``--json``)."""
    from rag_pipeline import SamplingOptions

    sampling = SamplingOptions(max_new_tokens=options.max_new_tokens)
    fusion = dataclasses.asdict(options.fusion)
    if not options.stream:
        return pipeline.ask(options.question, sampling=sampling, **fusion)
    show: Callable[[str], None] = write_error if json_output else write
    for piece in pipeline.stream(options.question, sampling=sampling, **fusion):
        if not isinstance(piece, str):
            show("\n")
            return piece
        show(piece)
    raise AssertionError("a stream ends with its answer")


def open_pipeline(options: AskOptions) -> RagPipeline:
    """Open index, embedder and engine; index and embedder load while the engine starts."""
    from rag_pipeline import PromptBuilder, RagPipeline
    from retrievers import DistinctRetriever

    if options.search not in SEARCHES:
        raise RagPipelineError(
            f"--search is {options.search!r}; it must be one of {', '.join(SEARCHES)}"
        )
    # What does not exist is refused before anything is opened.
    options.fusion.check()
    check_document_order(options.document_order)
    index = open_index(options.index, embedder=options.embedder, search=options.search)
    retriever = DistinctRetriever(index.retriever(options.search))
    folder = resolve_llm_shown(options.model).path
    builder = PromptBuilder(folder, document_order=options.document_order)
    # Refuses a question that cannot fit before half a minute is spent on starting an engine.
    builder.build(options.question, [], max_new_tokens=options.max_new_tokens)
    warm = _Warming(retriever)
    backend = _open_backend(options, folder, index)
    try:
        warm.finish()
        return RagPipeline(retriever, backend, builder, top_k=options.top_k)
    except BaseException:
        backend.close()
        raise


def _open_backend(options: AskOptions, folder: Path, index: Index) -> Backend:
    from rag_pipeline import EngineBackend, ServerBackend
    from rag_pipeline.cli.cache import use_store

    if options.server is not None:
        server = ServerBackend(options.server)
        server.check_model(folder)
        return server
    if not options.fusion.is_exact:
        use_store(options.store, index)
    with step(f"Starting SGLang with {options.model}"):
        return EngineBackend.start(folder)


class _Warming:
    """Loads the embedder's weights with one search, on a thread beside the engine's start."""

    def __init__(self, retriever: Retriever) -> None:
        self._error: BaseException | None = None

        def run() -> None:
            try:
                retriever.search("warm up", k=1)
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=run, name="warm-embedder", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Wait; raises what the thread met."""
        self._thread.join()
        if self._error is not None:
            raise self._error


def cited(answer: str, links: Sequence[Attribution]) -> str:
    """Write the number of its source behind each sentence that leans on one."""
    for link in reversed(links):
        answer = f"{answer[: link.end]} [{link.number}]{answer[link.end :]}"
    return answer


def print_answer(answer: Answer, *, with_text: bool = True) -> None:
    """Print answer, sources, usage and timings for a person."""
    from rag_pipeline.server.attribution import attribute

    links = attribute(answer.answer, [source.text for source in answer.sources])
    if with_text:
        write(f"{cited(answer.answer, links)}\n")
    write("\nSources\n")
    leaned_on = {link.number for link in links}
    for number, source in enumerate(answer.sources, start=1):
        place = f"  ({source.path})" if source.path and source.path != source.title else ""
        mark = ", the answer's words" if number in leaned_on else ""
        write(f"  [{number}] {source.title}{place}  score {source.score:.3f}{mark}\n")
    usage, timing = answer.usage, answer.timing
    write(
        f"Tokens   prompt {usage.prompt_tokens} = exact prefix {usage.exact_prefix_tokens} "
        f"+ reused {usage.reused_tokens} + recomputed {usage.recomputed_tokens} "
        f"+ fresh {usage.fresh_tokens}; answer {usage.completion_tokens}\n"
    )
    write(
        f"Time     retrieve {timing.retrieve_s:.3f} s, first token {timing.ttft_s:.2f} s, "
        f"total {timing.total_s:.2f} s\n"
    )
    if answer.dropped_sources:
        say(
            f"{len(answer.dropped_sources)} retrieved chunks did not fit the context and were "
            "left out; use a smaller --top-k or smaller chunks"
        )
