"""Programs on an ``sgl.Engine`` in this process; SGLang's own programs know servers only."""

from __future__ import annotations

import queue
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Unpack

from sglang.lang.backend.base_backend import BaseBackend

from rag_pipeline.errors import EngineError, one_line
from rag_pipeline.frontend.backend import ChunkPrograms, ProgramOptions
from rag_pipeline.frontend.roles import chat_template_of
from rag_pipeline.generation import EngineBackend
from rag_pipeline.prompts.tokenizer import ModelTokenizer

_END = object()


class RagEngine(ChunkPrograms, BaseBackend):  # type: ignore[misc]
    """Backend of programs on a running engine; the caller shuts the engine down.

    Parameters
    ----------
    engine : object
        ``sgl.Engine``, from :func:`rag_pipeline.sglang_plugin.create_engine`, or an
        :class:`~rag_pipeline.generation.EngineBackend` around one.
    **options : ProgramOptions
        ``policy``, ``ratio``, ``attention``, ``build_missing``, ``keep_turns``, ``truncation``; see
        :class:`.ChunkPrograms`.

    Examples
    --------
    >>> program.run(question="...", backend=RagEngine(engine))  # doctest: +SKIP
    """

    def __init__(
        self,
        engine: Any,
        **options: Unpack[ProgramOptions],
    ) -> None:
        BaseBackend.__init__(self)
        # It drives the engine's event loop for callers in any thread, one driver a loop.
        self._shared = engine if isinstance(engine, EngineBackend) else EngineBackend(engine)
        self._engine = self._shared.engine
        folder = Path(self._engine.server_args.model_path)
        loaded = ModelTokenizer.load(folder)
        ChunkPrograms.__init__(self, loaded, context_length=self._shared.context_length, **options)
        self.chat_template = chat_template_of(loaded, str(folder))

    @property
    def incremental(self) -> bool:
        """Whether the engine streams only what is new."""
        return self._shared._incremental

    def get_model_name(self) -> str:
        """Folder of the engine's model."""
        return str(self._engine.server_args.model_path)

    def flush_cache(self) -> None:
        """Empty the radix tree; stored chunks stay."""
        with self._shared._runner as runner:
            runner.submit(self._engine.tokenizer_manager.flush_cache()).result()

    def send(self, body: dict[str, Any]) -> Mapping[str, Any]:
        """Generate without a stream.

        Raises
        ------
        EngineError
            The engine refused the request.
        """
        with self._shared._runner as runner:
            try:
                answer: Mapping[str, Any] = runner.submit(
                    self._engine.async_generate(**_allowed(body))
                ).result()
            except ValueError as error:  # SGLang's word for a request it does not admit
                raise EngineError(f"the engine refused the request: {one_line(error)}") from error
        return answer

    def send_stream(self, body: dict[str, Any]) -> Iterator[Mapping[str, Any]]:
        """Generate and yield the messages of the stream."""
        messages: queue.SimpleQueue[Any] = queue.SimpleQueue()
        allowed = _allowed(body)

        async def pump() -> None:
            try:
                async for message in await self._engine.async_generate(**allowed):
                    messages.put(message)
            finally:
                messages.put(_END)

        with self._shared._runner as runner:
            task = runner.submit(pump())
            while (message := messages.get()) is not _END:
                yield message
            try:
                task.result()
            except ValueError as error:
                raise EngineError(f"the engine refused the request: {one_line(error)}") from error


def _allowed(body: dict[str, Any]) -> dict[str, Any]:
    """Fields that an engine takes; a server takes one more."""
    body = dict(body)
    if body.pop("return_text_in_logprobs", None):
        raise EngineError(
            "return_text_in_logprobs is not known to an engine in this process; leave it out, or "
            "use RagEndpoint"
        )
    return body
