"""Question in, answer out: retrieve, lay out, generate, with sources, usage and timings."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rag_pipeline.errors import RagPipelineError
from rag_pipeline.generation import Backend, extra_fields, usage_from_meta
from rag_pipeline.generation.base import finish_reason
from rag_pipeline.prompt_layout import PromptBuilder
from rag_pipeline.types import (
    Answer,
    GenerationPiece,
    GenerationRequest,
    PromptLayout,
    SamplingOptions,
    Source,
    Span,
    Timing,
)
from retrievers.types import Chunk, Retriever, SearchHit

DEFAULT_TOP_K = 4


class RagPipeline:
    """Retrieval-augmented generation over one retriever and one backend.

    Parameters
    ----------
    retriever
        Anything with ``search(query, k=..., where=...)``.
    backend
        :class:`~rag_pipeline.generation.EngineBackend` or
        :class:`~rag_pipeline.generation.ServerBackend`; closed by :meth:`close`.
    builder
        Lays out the prompts, or the model's folder for a builder with default templates.
    top_k
        Chunks to retrieve when a call does not say.

    Examples
    --------
    >>> pipeline = RagPipeline(index, EngineBackend.start(folder), folder)  # doctest: +SKIP
    >>> pipeline.ask("What does the with statement do?").answer  # doctest: +SKIP
    """

    def __init__(
        self,
        retriever: Retriever,
        backend: Backend,
        builder: PromptBuilder | Path | str,
        *,
        top_k: int = DEFAULT_TOP_K,
    ) -> None:
        _check_k(top_k)
        self.retriever = retriever
        self.backend = backend
        self.builder = builder if isinstance(builder, PromptBuilder) else PromptBuilder(builder)
        self.top_k = top_k

    def ask(
        self,
        question: str,
        *,
        top_k: int | None = None,
        sampling: SamplingOptions | None = None,
        where: Mapping[str, object] | None = None,
        policy: str = "prefix",
        ratio: float | None = None,
    ) -> Answer:
        """Answer one question.

        Parameters
        ----------
        question
            The question.
        top_k
            Chunks to retrieve, at least 1; the pipeline's own number when None.
        sampling
            How to decode; greedy, 128 tokens when None.
        where
            Filter on chunk metadata, handed to the retriever.
        policy, ratio
            Selection policy of the fusion and its share of recomputed tokens.

        Returns
        -------
        Answer
            Text, sources, usage, timings.

        Raises
        ------
        RagPipelineError
            A bad parameter, a question that does not fit, an engine that refuses.
        RetrievalError
            From the retriever.
        """
        result: str | Answer = ""
        for piece in self.stream(
            question, top_k=top_k, sampling=sampling, where=where, policy=policy, ratio=ratio
        ):
            result = piece
        assert isinstance(result, Answer)
        return result

    def stream(
        self,
        question: str,
        *,
        top_k: int | None = None,
        sampling: SamplingOptions | None = None,
        where: Mapping[str, object] | None = None,
        policy: str = "prefix",
        ratio: float | None = None,
    ) -> Generator[str | Answer, None, None]:
        """Answer one question piece by piece; parameters as for :meth:`ask`.

        Closing the generator aborts the request in the engine.

        Yields
        ------
        str or Answer
            Pieces of text as they come, then the whole :class:`~rag_pipeline.types.Answer`.
        """
        run = _Run.start(self, question, top_k, sampling, policy, ratio)
        hits = self.retriever.search(run.question, k=run.top_k, where=where)
        request = run.lay_out(self, hits)
        pieces = self.backend.generate(request)
        try:
            for piece in pieces:
                text = run.take(piece)
                if text:
                    yield text
        finally:
            pieces.close()
        yield run.answer()

    async def aask(
        self,
        question: str,
        *,
        top_k: int | None = None,
        sampling: SamplingOptions | None = None,
        where: Mapping[str, object] | None = None,
        policy: str = "prefix",
        ratio: float | None = None,
    ) -> Answer:
        """Answer one question without blocking the event loop; as :meth:`ask`."""
        result: str | Answer = ""
        async for piece in self.astream(
            question, top_k=top_k, sampling=sampling, where=where, policy=policy, ratio=ratio
        ):
            result = piece
        assert isinstance(result, Answer)
        return result

    async def astream(
        self,
        question: str,
        *,
        top_k: int | None = None,
        sampling: SamplingOptions | None = None,
        where: Mapping[str, object] | None = None,
        policy: str = "prefix",
        ratio: float | None = None,
    ) -> AsyncGenerator[str | Answer, None]:
        """Answer piece by piece without blocking the event loop; as :meth:`stream`.

        Retrieval and layout run in a worker thread.
        """
        run = _Run.start(self, question, top_k, sampling, policy, ratio)

        def prepare() -> GenerationRequest:
            hits = self.retriever.search(run.question, k=run.top_k, where=where)
            return run.lay_out(self, hits)

        request = await asyncio.to_thread(prepare)
        pieces = self.backend.agenerate(request)
        try:
            async for piece in pieces:
                text = run.take(piece)
                if text:
                    yield text
        finally:
            await pieces.aclose()
        yield run.answer()

    def warm(
        self,
        chunks: Iterable[Chunk],
        *,
        progress: Callable[[int], None] | None = None,
    ) -> int:
        """Compute and keep the KV of chunks ahead of the questions, behind the shared prefix.

        Parameters
        ----------
        chunks
            Chunks as the retriever returns them.
        progress
            Called with the number of chunks done after each.

        Returns
        -------
        int
            Chunks sent to the engine, those that it holds already included.
        """
        prefix = self.builder.system_ids
        done = 0
        for chunk in chunks:
            ids = self.builder.chunk_ids(chunk)
            # Two variants: for the chunk's own place, and for every other.
            for passage in (False, True):
                request = GenerationRequest(
                    input_ids=(*prefix, *ids),
                    spans=(Span(start=len(prefix), end=len(prefix) + len(ids), chunk_id=chunk.id),),
                    sampling=SamplingOptions(max_new_tokens=1),
                    build=True,
                    passage=passage,
                )
                for _ in self.backend.generate(request):
                    pass
            done += 1
            if progress is not None:
                progress(done)
        return done

    def close(self) -> None:
        """Close the backend."""
        self.backend.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


@dataclass(kw_only=True, slots=True)
class _Run:
    """One question on its way; sync and async differ only in how they wait."""

    question: str
    top_k: int
    sampling: SamplingOptions
    policy: str
    ratio: float | None
    started: float
    retrieved: float = 0.0
    first: float | None = None
    layout: PromptLayout | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    text: str = ""

    @classmethod
    def start(
        cls,
        pipeline: RagPipeline,
        question: str,
        top_k: int | None,
        sampling: SamplingOptions | None,
        policy: str,
        ratio: float | None,
    ) -> _Run:
        """Check everything that can be checked before any work."""
        started = time.perf_counter()
        if not isinstance(question, str) or not question.strip():
            raise RagPipelineError("the question is empty; give at least one word")
        k = pipeline.top_k if top_k is None else top_k
        _check_k(k)
        sampling = sampling or SamplingOptions()
        extra_fields(GenerationRequest(input_ids=(), sampling=sampling, policy=policy, ratio=ratio))
        return cls(
            question=question.strip(),
            top_k=k,
            sampling=sampling,
            policy=policy,
            ratio=ratio,
            started=started,
        )

    def lay_out(self, pipeline: RagPipeline, hits: list[SearchHit]) -> GenerationRequest:
        """Turn the hits into a request; retrieval ends here."""
        self.retrieved = time.perf_counter()
        self.layout = pipeline.builder.build(
            self.question,
            hits,
            max_new_tokens=self.sampling.max_new_tokens,
            context_length=pipeline.backend.context_length,
        )
        return GenerationRequest(
            input_ids=self.layout.input_ids,
            spans=self.layout.chunk_spans,
            sampling=self.sampling,
            policy=self.policy,
            ratio=self.ratio,
        )

    def take(self, piece: GenerationPiece) -> str:
        """Note one piece and return the text to hand on; leading white space is dropped."""
        if self.first is None:
            self.first = time.perf_counter()
        # An incremental stream reports the fusion in its first message only, and empty afterwards.
        self.meta.update({key: value for key, value in piece.meta_info.items() if value != []})
        text = piece.text if self.text else piece.text.lstrip()
        self.text += text
        return text

    def answer(self) -> Answer:
        """Sum up when the last piece has come."""
        assert self.layout is not None
        now = time.perf_counter()
        meta = self.meta
        return Answer(
            answer=self.text.strip(),
            sources=tuple(Source.from_hit(hit) for hit in self.layout.chunks),
            usage=usage_from_meta(meta, prompt_tokens=len(self.layout.input_ids)),
            timing=Timing(
                retrieve_s=self.retrieved - self.started,
                ttft_s=(self.first or now) - self.retrieved,
                total_s=now - self.started,
            ),
            policy=self.policy,
            ratio=self.ratio,
            dropped_sources=tuple(Source.from_hit(hit) for hit in self.layout.dropped),
            finish_reason=finish_reason(meta)[0],
        )


def _check_k(top_k: int) -> None:
    if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1:
        raise RagPipelineError(f"top_k is {top_k!r}; it must be a whole number, at least 1")
