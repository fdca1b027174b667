"""Programs on a running SGLang server."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Unpack

from sglang.lang.backend.runtime_endpoint import RuntimeEndpoint
from sglang.utils import http_request

from rag_pipeline.errors import EngineError, one_line
from rag_pipeline.frontend.backend import ChunkPrograms, ProgramOptions
from rag_pipeline.frontend.roles import chat_template_of
from rag_pipeline.generation import ServerBackend
from rag_pipeline.prompts.tokenizer import ModelTokenizer


class RagEndpoint(ChunkPrograms, RuntimeEndpoint):  # type: ignore[misc]
    """SGLang's ``RuntimeEndpoint`` that sends token ids with the place of every chunk.

    Parameters
    ----------
    base_url : str
        The server, for example ``http://127.0.0.1:30000``.
    api_key : str, optional
        For servers started with ``--api-key``.
    tokenizer : str, Path, optional
        Folder of the model's tokenizer; by default the folder that the server names, which must
        then lie on this machine.
    **options : ProgramOptions
        ``policy``, ``ratio``, ``attention``, ``build_missing``, ``keep_turns``, ``truncation``; see
        :class:`.ChunkPrograms`.

    Raises
    ------
    RagPipelineError
        Nobody answers, the server is not SGLang, its tokenizer is not here, or a bad policy.

    Examples
    --------
    >>> sgl.set_default_backend(RagEndpoint("http://127.0.0.1:30000"))  # doctest: +SKIP
    """

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        *,
        tokenizer: str | Path | None = None,
        **options: Unpack[ProgramOptions],
    ) -> None:
        server = ServerBackend(base_url, api_key=api_key)
        try:
            if tokenizer is not None:
                server.check_model(Path(tokenizer))
            loaded = ModelTokenizer.load_served(tokenizer or server.model_path)
            self._incremental = server._incremental
            context_length = server.context_length
        finally:
            server.close()
        RuntimeEndpoint.__init__(self, server.url, api_key)
        ChunkPrograms.__init__(self, loaded, context_length=context_length, **options)
        self.support_concate_and_append = False  # this SGLang has no such route
        self.chat_template = chat_template_of(loaded, server.model_path)

    @property
    def incremental(self) -> bool:
        """Whether the server streams only what is new."""
        return self._incremental

    def send(self, body: dict[str, Any]) -> Mapping[str, Any]:
        """Send to ``/generate``.

        Raises
        ------
        EngineError
            The server refused the request.
        """
        answer: Mapping[str, Any] = self._post(body).json()
        return answer

    def send_stream(self, body: dict[str, Any]) -> Iterator[Mapping[str, Any]]:
        """Send to ``/generate`` and read its stream."""
        response = self._post(body, stream=True)
        try:
            for line in response.iter_lines(decode_unicode=False):
                data = line.decode("utf-8").removeprefix("data:").strip()
                if data and data != "[DONE]":
                    yield json.loads(data)
        finally:
            response.close()

    def _post(self, body: dict[str, Any], **options: Any) -> Any:
        response = http_request(
            f"{self.base_url}/generate", json=body, api_key=self.api_key, **options
        )
        if response.status_code != 200:
            detail = one_line(response.text, 300)
            raise EngineError(
                f"the server at {self.base_url} refused the request "
                f"({response.status_code}): {detail}"
            )
        return response
