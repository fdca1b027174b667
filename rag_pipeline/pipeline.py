"""Question in, answer out: retrieve, lay out, generate, with sources, usage and timings."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Mapping
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Self, Unpack

from rag_pipeline.generation import Backend
from rag_pipeline.memory import MemoryConfig, parse_memory
from rag_pipeline.opened_memory import open_memory
from rag_pipeline.prompts.builder import PromptBuilder
from rag_pipeline.prompts.warm_up import warm_requests
from rag_pipeline.question_run import AnswerRun, QuestionOptions, QuestionRun, check_top_k
from rag_pipeline.types import Answer
from retrievers.types import Chunk, Retriever

if TYPE_CHECKING:
    from rag_pipeline.memory import Memory

DEFAULT_TOP_K = 4


class RagPipeline:
    """Retrieval-augmented generation over one retriever and one backend.

    Parameters
    ----------
    retriever : Retriever
        Anything with ``search(query, k=..., where=...)``.
    backend : Backend
        :class:`~rag_pipeline.generation.EngineBackend` or
        :class:`~rag_pipeline.generation.ServerBackend`; closed by :meth:`close`.
    builder : PromptBuilder, Path or str
        Lays out the prompts, or the model's folder for a builder with default templates.
    top_k : int
        Chunks to retrieve when a call does not say.
    memory : MemoryConfig, mapping, str or None
        What long histories are answered from when a call does not say
        (:class:`~rag_pipeline.question_run.QuestionOptions`); all of them when None.

    Raises
    ------
    RagPipelineError
        A memory that is not allowed, or `top_k` below 1.

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
        memory: MemoryConfig | Mapping[str, Any] | str | None = None,
    ) -> None:
        check_top_k(top_k)
        self.memory = parse_memory(memory)
        self._memories: dict[MemoryConfig, Memory] = {}
        self._lock = Lock()
        self.retriever = retriever
        self.backend = backend
        self.builder = builder if isinstance(builder, PromptBuilder) else PromptBuilder(builder)
        self.top_k = top_k

    def ask(self, question: str, **options: Unpack[QuestionOptions]) -> Answer:
        """Answer one question.

        Parameters
        ----------
        question : str
            The question.
        **options : QuestionOptions
            ``top_k``, ``sampling``, ``where``, ``history``, ``truncation``, ``policy``, ``ratio``,
            ``attention``, ``memory``; see
            :class:`~rag_pipeline.question_run.QuestionOptions`.

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
        for piece in self.stream(question, **options):
            result = piece
        assert isinstance(result, Answer)
        return result

    def stream(
        self, question: str, **options: Unpack[QuestionOptions]
    ) -> Generator[str | Answer, None, None]:
        """Answer one question piece by piece; parameters as for :meth:`ask`.

        Closing the generator aborts the request in the engine.

        Yields
        ------
        str or Answer
            Pieces of text as they come, then the whole :class:`~rag_pipeline.types.Answer`.
        """
        run = self._start(question, options)
        answer = self._prepare(run)
        pieces = self.backend.generate(answer.request)
        try:
            for piece in pieces:
                text = answer.take(piece)
                if text:
                    yield text
        finally:
            pieces.close()
        yield answer.answer()

    async def aask(self, question: str, **options: Unpack[QuestionOptions]) -> Answer:
        """Answer one question without blocking the event loop; as :meth:`ask`."""
        result: str | Answer = ""
        async for piece in self.astream(question, **options):
            result = piece
        assert isinstance(result, Answer)
        return result

    async def astream(
        self, question: str, **options: Unpack[QuestionOptions]
    ) -> AsyncGenerator[str | Answer, None]:
        """Answer piece by piece without blocking the event loop; as :meth:`stream`.

        Retrieval and layout run in a worker thread.
        """
        run = self._start(question, options)
        answer = await asyncio.to_thread(self._prepare, run)
        pieces = self.backend.agenerate(answer.request)
        try:
            async for piece in pieces:
                text = answer.take(piece)
                if text:
                    yield text
        finally:
            await pieces.aclose()
        yield answer.answer()

    def _start(self, question: str, options: QuestionOptions) -> QuestionRun:
        run = QuestionRun.start(question, self.top_k, **options)
        if options.get("memory") is None:
            run.memory = self.memory
        return run

    def _prepare(self, run: QuestionRun) -> AnswerRun:
        """Retrieve and lay out: all that comes before the backend."""
        hits = self.retriever.search(run.question, k=run.top_k, where=run.where)
        if run.memory is not None and run.history:
            memory = self._memory_of(run.memory)
            length = self.backend.context_length
            answer = run.remember(self.builder, memory, hits, context_length=length)
            if answer is not None:
                return answer
        return run.lay_out(self.builder, hits, context_length=self.backend.context_length)

    def warm(
        self,
        chunks: Iterable[Chunk],
        *,
        progress: Callable[[int], None] | None = None,
    ) -> int:
        """Compute and keep the KV of chunks ahead of the questions, behind the shared prefix.

        Parameters
        ----------
        chunks : iterable of Chunk
            Chunks as the retriever returns them.
        progress : callable, optional
            Called with the number of chunks done after each.

        Returns
        -------
        int
            Chunks sent to the engine, those that it holds already included.
        """
        done = 0
        for chunk in chunks:
            for request in warm_requests(self.builder, chunk):
                for _ in self.backend.generate(request):
                    pass
            done += 1
            if progress is not None:
                progress(done)
        return done

    def _memory_of(self, config: MemoryConfig) -> Memory:
        with self._lock:
            memory = self._memories.get(config)
            if memory is None:
                memory = open_memory(config, self.backend, self.builder.tokenizer)
                self._memories[config] = memory
            return memory

    def close(self) -> None:
        """End the building of memories, and close the backend."""
        with self._lock:
            memories, self._memories = self._memories, {}
        for memory in memories.values():
            memory.close()
        self.backend.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
