"""Between LangChain's OpenAI payloads and SGLang: what is asked of the server, and what it reports."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from langchain_core.messages import AIMessageChunk
from langchain_core.messages.ai import InputTokenDetails, UsageMetadata
from langchain_core.outputs import ChatGenerationChunk

from rag_pipeline.generation import ServerBackend
from rag_pipeline.prompts.tokenizer import ModelTokenizer
from rag_pipeline.protocol import StreamReader, fusion_report, memory_report, usage_from_meta

RAG_KEY = "rag"
"""Key of this project's report in ``response_metadata``."""

_SAMPLING = {
    "max_completion_tokens": "max_new_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "stop": "stop",
    "seed": "sampling_seed",
    "frequency_penalty": "frequency_penalty",
    "presence_penalty": "presence_penalty",
    "repetition_penalty": "repetition_penalty",
    "min_tokens": "min_new_tokens",
    "stop_token_ids": "stop_token_ids",
    "ignore_eos": "ignore_eos",
    "skip_special_tokens": "skip_special_tokens",
    "regex": "regex",
    "ebnf": "ebnf",
    "custom_params": "custom_params",
}
_TOP_LEVEL = ("input_ids", "cache_salt", "extra_key", "priority", "rid")
_IMPLIED = frozenset({"messages", "model", "stream", "stream_options", "extra_body"})


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedModel:
    """What a client must know of a server to lay out prompts for it.

    Parameters
    ----------
    url : str
        Without ``/v1``.
    model_path : str
        As the server names it.
    context_length : int
        Most tokens of prompt and answer together.
    incremental : bool
        Whether streamed pieces carry only what is new.
    """

    url: str
    model_path: str
    context_length: int
    incremental: bool

    @classmethod
    def ask(cls, base_url: str, api_key: str | None) -> ServedModel:
        """Ask a server.

        Raises
        ------
        EngineError
            Nobody answers at `base_url`, or something that is not SGLang.
        """
        backend = ServerBackend(base_url.rstrip("/").removesuffix("/v1"), api_key=api_key)
        try:
            return cls(
                url=backend.url,
                model_path=backend.model_path,
                context_length=backend.context_length,
                incremental=backend._incremental,
            )
        finally:
            backend.close()

    def load_tokenizer(self, folder: str | None, api_key: str | None = None) -> ModelTokenizer:
        """Tokenizer of the server's model.

        Parameters
        ----------
        folder : str or None
            The model's folder on this machine; None tries the path that the server names.
        api_key : str, optional
            Of the server, where it wants one.

        Raises
        ------
        ModelError
            The folder is not here, or holds no tokenizer.
        EngineError
            The server's model is another one than that of `folder`.
        """
        if folder is not None:
            backend = ServerBackend(self.url, api_key=api_key)
            try:
                backend.check_model(Path(folder))
            finally:
                backend.close()
            return ModelTokenizer.load(folder)
        return ModelTokenizer.load_served(self.model_path)


def generate_body(payload: Mapping[str, Any]) -> dict[str, Any] | None:
    """Request for SGLang's ``/generate`` from one for the chat endpoint.

    Parameters
    ----------
    payload : mapping
        As ``ChatOpenAI`` makes it, with ``input_ids`` in ``extra_body``.

    Returns
    -------
    dict or None
        None where the payload asks for something that only the chat endpoint does: several
        answers, log-probabilities, tools, structured output, an adapter.
    """
    fields = {key: value for key, value in payload.items() if key not in _IMPLIED}
    fields |= payload.get("extra_body") or {}
    if fields.pop("n", None) not in (None, 1) or ":" in str(payload.get("model", "")):
        return None
    known = {*_SAMPLING, *_TOP_LEVEL}
    if any(key not in known for key, value in fields.items() if value not in (None, False)):
        return None
    sampling = {name: fields[key] for key, name in _SAMPLING.items() if fields.get(key) is not None}
    body = {key: fields[key] for key in _TOP_LEVEL if fields.get(key) is not None}
    return {**body, "sampling_params": sampling, "stream": True}


def token_report(meta: Mapping[str, Any]) -> dict[str, Any]:
    """What happened to a prompt's tokens: ``usage``, ``policy``, ``ratio``, and ``fallback`` and ``memory`` if any."""
    prompt_tokens = int(meta.get("prompt_tokens") or 0)
    report = fusion_report(meta) or {}
    facts: dict[str, Any] = {
        "usage": asdict(usage_from_meta(meta, prompt_tokens=prompt_tokens)),
        "policy": report.get("policy") or None,
        "ratio": report.get("ratio"),
    }
    if report.get("fallback"):
        facts["fallback"] = report["fallback"]
    if memory := memory_report(report):
        facts["memory"] = dict(memory)
    return facts


def usage_metadata(meta: Mapping[str, Any]) -> UsageMetadata:
    """Token counts as LangChain names them; ``cache_read`` is the exact prefix."""
    prompt, answer = (int(meta.get(f"{kind}_tokens") or 0) for kind in ("prompt", "completion"))
    exact = token_report(meta)["usage"]["exact_prefix_tokens"]
    return UsageMetadata(
        input_tokens=prompt,
        output_tokens=answer,
        total_tokens=prompt + answer,
        input_token_details=InputTokenDetails(cache_read=exact),
    )


class ChunkReader:
    """Turns the messages of ``/generate`` into LangChain's chunks.

    Parameters
    ----------
    model_name : str
        For ``response_metadata``.
    incremental : bool
        Whether the server sends only what is new.
    facts : mapping
        Added to the report on the tokens.
    """

    def __init__(self, *, model_name: str, incremental: bool, facts: Mapping[str, Any]) -> None:
        self._model_name = model_name
        self._reader = StreamReader(incremental=incremental, sender="server")
        self._facts = facts

    def read(self, event: Any) -> Iterator[ChatGenerationChunk]:
        """Chunks of one message; the last message gives a second one with the report.

        Raises
        ------
        EngineError
            The server aborted the request.
        """
        piece = self._reader.read(event)
        yield ChatGenerationChunk(message=AIMessageChunk(content=piece.text))
        if self._reader.finish is not None:
            metadata = {
                "finish_reason": self._reader.finish,
                "model_name": self._model_name,
                "model_provider": "openai",
                RAG_KEY: {**token_report(piece.meta_info), **self._facts},
            }
            last = AIMessageChunk(
                content="",
                response_metadata=metadata,
                usage_metadata=usage_metadata(piece.meta_info),
            )
            yield ChatGenerationChunk(message=last)
