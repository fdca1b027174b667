"""LangChain's ``ChatOpenAI`` for an SGLang server with this project's plugin: documents as chunks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from functools import partial
from threading import Lock
from typing import Any

import openai
from langchain_core.callbacks import (
    AsyncCallbackManagerForLLMRun,
    CallbackManagerForLLMRun,
)
from langchain_core.documents import Document
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from langchain_openai import ChatOpenAI
from pydantic import Field, PrivateAttr, SecretStr

from rag_pipeline.errors import RagPipelineError
from rag_pipeline.langchain.document_text import with_documents
from rag_pipeline.langchain.layout import (
    ChatLayout,
    ChatLayouter,
    has_documents,
    without_documents,
)
from rag_pipeline.langchain.wire import (
    RAG_KEY,
    ChunkReader,
    ServedModel,
    generate_body,
    token_report,
    usage_metadata,
)
from rag_pipeline.models.decoding import repetition_penalty_of
from rag_pipeline.prompts.builder import DEFAULT_CHUNK_TEMPLATE, DEFAULT_CONTEXT_HEADER
from rag_pipeline.prompts.document_order import RETRIEVED
from rag_pipeline.prompts.segments import SegmentEncoder
from rag_pipeline.prompts.truncation import CUT_SHARE, Truncation
from rag_pipeline.protocol import PARAM_PREFIX, FusionChoice

DEFAULT_ANSWER_TOKENS = 512
"""Length of an answer with documents where nobody says: room for it must be kept in the context."""

MEMORY_PARAM = f"{PARAM_PREFIX}memory"
"""In ``custom_params``: a server that keeps no memory refuses it, where it would drop a field that it does not know."""

_NEUTRAL = {"top_k": -1, "min_p": 0.0}
"""SGLang's chat endpoint takes what is unsaid from the model's generation config, ``/generate`` does
not; saying it makes ``invoke`` and ``stream`` decode alike."""


class ChatSGLangRag(ChatOpenAI):
    """Chat model on an SGLang server; documents are sent as chunks whose KV can be reused.

    Without documents it is ``ChatOpenAI`` with other defaults. With documents the prompt is laid
    out here, in token ids, with the model's tokenizer: the server gets the exact place of every
    chunk. ``response_metadata["rag"]`` then holds ``usage`` (tokens of the prompt by what happened
    to them), ``policy``, ``ratio``, ``documents`` and ``dropped``.

    Documents are given with a call (``invoke(messages, documents=[...])``), bound
    (``model.bind(documents=[...])``), or stand in a message as content blocks
    ``{"type": "text-plain", "text": ..., "title": ..., "id": ...}``. With ``conversation="NAME"``
    beside them or without them, what this turn computed is kept for the next turn of that name, as
    far as the server's ``fusion.conversation_memory`` keeps it.

    With ``memory`` a long conversation is answered from a cache of fixed size that ``rag-pipeline serve`` keeps: the whole
    conversation is sent as ever, the server lays the prompt out, and documents are text in it.

    Parameters
    ----------
    base_url : str or None
        The server, with ``/v1`` at the end; ``http://127.0.0.1:30000/v1`` by default.
    api_key : SecretStr or None
        For servers started with ``--api-key``. ``OPENAI_API_KEY`` is not read: it is not for this
        server.
    policy, ratio : str, float or None
        Selection policy of the fusion and its share of recomputed tokens; ``prefix`` is ordinary
        prefill.
    attention : str
        Method that says which keys the computed rows of a prompt read; the server's default when empty.
    tokenizer : str or None
        Folder of the model's tokenizer; by default the folder that the server names, which must
        then lie on this machine.
    chunk_template, context_header : str
        How a document stands in the prompt; as for :class:`rag_pipeline.PromptBuilder`.
    chat_truncation, cut_share : str, float
        What becomes of a conversation that does not fit the context: ``auto`` cuts its oldest
        turns, that share of the context at once, and says so in
        ``response_metadata["rag"]["truncated"]``; ``disabled`` refuses it. For requests that are
        laid out here: with documents or a conversation's name. (``truncation`` is a field of
        ``ChatOpenAI``, for OpenAI's Responses API.)
    memory : str, mapping or None
        What a long conversation is answered from: a method such as ``epicache``, or a mapping such as ``{"method":
        "epicache", "budget_tokens": 2048, "episodes": 4}``; ``off`` for all of it; the server's default when None. May
        also be given with a call or bound.
    document_order : str
        Where documents stand that are given beside the messages, the best first; as for
        :class:`rag_pipeline.PromptBuilder`.
    temperature, top_p : float or None
        Greedy by default.

    Raises
    ------
    RagPipelineError
        On use: a server that does not answer or is not SGLang, a prompt that does not fit, tools
        together with documents.

    Examples
    --------
    >>> model = ChatSGLangRag(base_url="http://127.0.0.1:30000/v1")  # doctest: +SKIP
    >>> model.invoke("What is it about?", documents=docs).response_metadata["rag"]  # doctest: +SKIP
    """

    model_name: str = Field(default="default", alias="model")
    openai_api_base: str | None = Field(default="http://127.0.0.1:30000/v1", alias="base_url")
    openai_api_key: SecretStr | None = Field(default=SecretStr("EMPTY"), alias="api_key")
    temperature: float | None = 0.0
    top_p: float | None = 1.0
    stream_usage: bool | None = True
    use_responses_api: bool | None = False
    policy: str = "query"
    ratio: float | None = None
    attention: str = ""
    tokenizer: str | None = None
    chunk_template: str = DEFAULT_CHUNK_TEMPLATE
    context_header: str = DEFAULT_CONTEXT_HEADER
    chat_truncation: Truncation = "auto"
    cut_share: float = CUT_SHARE
    document_order: str = RETRIEVED
    memory: str | dict[str, Any] | None = None

    _lock: Lock = PrivateAttr(default_factory=Lock)
    _served: ServedModel | None = PrivateAttr(default=None)
    _layouter: ChatLayouter | None = PrivateAttr(default=None)
    _penalty: float = PrivateAttr(default=1.0)

    @classmethod
    def is_lc_serializable(cls) -> bool:
        """Return False: LangChain loads the classes of its own list only."""
        return False

    @property
    def _llm_type(self) -> str:
        return "sglang-rag-chat"

    # -- one request -------------------------------------------------------------------------

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        layout, messages, kwargs = self._prepare(messages, kwargs)
        return _noted(super()._generate(messages, stop, run_manager, **kwargs), layout)

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        layout, messages, kwargs = await asyncio.to_thread(self._prepare, messages, kwargs)
        return _noted(await super()._agenerate(messages, stop, run_manager, **kwargs), layout)

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        layout, messages, kwargs = self._prepare(messages, kwargs, stream=True)
        body = self._generate_body(messages, stop, kwargs, layout)
        if body is None:
            yield from super()._stream(messages, stop, run_manager, **kwargs)
            return
        assert layout is not None
        reader = self._reader(layout)
        with self.root_client.post(
            f"{self._server().url}/generate",
            body=body,
            cast_to=object,
            stream=True,
            stream_cls=openai.Stream[object],
        ) as stream:
            for event in stream:
                for chunk in reader.read(event):
                    if run_manager:
                        run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                    yield chunk

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        prepare = partial(self._prepare, messages, kwargs, stream=True)
        layout, messages, kwargs = await asyncio.to_thread(prepare)
        body = self._generate_body(messages, stop, kwargs, layout)
        if body is None:
            async for chunk in super()._astream(messages, stop, run_manager, **kwargs):
                yield chunk
            return
        assert layout is not None
        reader = self._reader(layout)
        stream = await self.root_async_client.post(
            f"{self._server().url}/generate",
            body=body,
            cast_to=object,
            stream=True,
            stream_cls=openai.AsyncStream[object],
        )
        async with stream:
            async for event in stream:
                for chunk in reader.read(event):
                    if run_manager:
                        await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                    yield chunk

    def _create_chat_result(
        self,
        response: dict[str, Any] | openai.BaseModel,
        generation_info: dict[str, Any] | None = None,
    ) -> ChatResult:
        result = super()._create_chat_result(response, generation_info)
        fields = response if isinstance(response, dict) else response.model_dump()
        for generation, choice in zip(result.generations, fields["choices"], strict=True):
            message, meta = generation.message, choice.get("meta_info")
            if isinstance(message, AIMessage) and isinstance(meta, Mapping):
                message.response_metadata[RAG_KEY] = token_report(meta)
                message.usage_metadata = usage_metadata(meta)
        return result

    # -- laying out --------------------------------------------------------------------------

    def _prepare(
        self, messages: list[BaseMessage], kwargs: Mapping[str, Any], *, stream: bool = False
    ) -> tuple[ChatLayout | None, list[BaseMessage], dict[str, Any]]:
        """Lay out where there are documents, and put what the server shall know into the body."""
        kwargs = dict(kwargs)
        documents: Sequence[Document] | None = kwargs.pop("documents", None)
        conversation: str = kwargs.pop("conversation", None) or ""
        memory: str | Mapping[str, Any] | None = kwargs.pop("memory", self.memory)
        body = {**(self.extra_body or {}), **(kwargs.get("extra_body") or {})}
        if memory not in (None, "off"):
            if conversation:
                raise RagPipelineError(
                    f"memory beside conversation {conversation!r:.80}; leave one out"
                )
            messages = with_documents(
                messages, documents or (), self.chunk_template, self.context_header
            )
            documents = None
        if memory is not None:
            body["custom_params"] = {**(body.get("custom_params") or {}), MEMORY_PARAM: memory}
        if documents is None and not conversation and not has_documents(messages):
            if not stream:  # SGLang refuses it in a stream
                body.setdefault("return_meta_info", True)
            return None, messages, {**kwargs, "extra_body": body}
        if kwargs.get("tools"):
            raise RagPipelineError(
                "tools and documents, or a conversation, in one request: such a prompt is laid out "
                "without tools; ask the two in separate requests"
            )
        room = kwargs.get("max_tokens") or kwargs.get("max_completion_tokens") or self.max_tokens
        if room is None:
            room = kwargs["max_tokens"] = DEFAULT_ANSWER_TOKENS
        layout = self._layouts().build(
            messages, documents or (), max_new_tokens=room, truncation=self.chat_truncation
        )
        fusion = FusionChoice.of(self).request(
            layout.spans, prefix_len=layout.prefix_len, conversation=conversation
        )
        custom = {**(body.get("custom_params") or {}), **fusion.to_custom_params()}
        said = {**_NEUTRAL, "repetition_penalty": self._penalty, **body}
        body = {**said, "input_ids": list(layout.input_ids), "custom_params": custom}
        if not stream:
            body["return_meta_info"] = True
        return layout, without_documents(layout.messages), {**kwargs, "extra_body": body}

    def _generate_body(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None,
        kwargs: Mapping[str, Any],
        layout: ChatLayout | None,
    ) -> dict[str, Any] | None:
        """Request for ``/generate``; None where the chat endpoint must serve.

        SGLang's chat endpoint reports no reuse in a stream, so a stream with documents goes to
        ``/generate`` when nothing was asked for that only the chat endpoint does.
        """
        if layout is None:
            return None
        kwargs = {key: value for key, value in kwargs.items() if key != "stream_usage"}
        return generate_body(self._get_request_payload(messages, stop=stop, **kwargs))

    def _reader(self, layout: ChatLayout) -> ChunkReader:
        return ChunkReader(
            model_name=self.model_name,
            incremental=self._server().incremental,
            facts=layout.facts,
        )

    def _server(self) -> ServedModel:
        with self._lock:
            if self._served is None:
                self._served = ServedModel.ask(str(self.openai_api_base), self._key())
            return self._served

    def _key(self) -> str | None:
        key = self.openai_api_key
        return key.get_secret_value() if isinstance(key, SecretStr) else None

    def _layouts(self) -> ChatLayouter:
        server = self._server()
        with self._lock:
            if self._layouter is None:
                self._penalty = repetition_penalty_of(self.tokenizer or server.model_path)
                self._layouter = ChatLayouter(
                    SegmentEncoder(server.load_tokenizer(self.tokenizer, self._key())),
                    context_length=server.context_length,
                    chunk_template=self.chunk_template,
                    context_header=self.context_header,
                    cut_share=self.cut_share,
                    document_order=self.document_order,
                )
            return self._layouter


def _noted(result: ChatResult, layout: ChatLayout | None) -> ChatResult:
    if layout is not None:
        for generation in result.generations:
            report = generation.message.response_metadata.setdefault(RAG_KEY, {})
            report |= layout.facts
    return result
