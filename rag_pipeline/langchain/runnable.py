"""Retrieve, lay out, generate, as one LangChain runnable: the answer with its source documents."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

from langchain_core.callbacks import (
    AsyncCallbackManagerForChainRun,
    CallbackManagerForChainRun,
)
from langchain_core.documents import Document
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import BaseMessage, HumanMessage, SystemMessage
from langchain_core.runnables import Runnable, RunnableConfig, RunnableSerializable
from langchain_core.runnables.utils import AddableDict
from pydantic import ConfigDict, Field, field_validator

from rag_pipeline.errors import RagPipelineError
from rag_pipeline.langchain.chat_model import ChatSGLangRag
from rag_pipeline.langchain.document_text import written
from rag_pipeline.langchain.wire import RAG_KEY
from rag_pipeline.prompts.builder import (
    DEFAULT_CHUNK_TEMPLATE,
    DEFAULT_CONTEXT_HEADER,
    DEFAULT_QUESTION_TEMPLATE,
    DEFAULT_SYSTEM,
)

Question = str | dict[str, Any]


class RagRunnable(RunnableSerializable[Question, dict[str, Any]]):
    """Question in, answer and sources out.

    The input is a question, or a mapping with ``question`` and, for a conversation,
    ``chat_history`` (messages). The output is a mapping with ``question``, ``documents``,
    ``answer`` and ``rag`` (``response_metadata["rag"]`` of the chat model; empty for a model that
    is not ours). A stream gives parts of it that add up: the documents first, then the answer
    piece by piece, then ``rag``.

    Parameters
    ----------
    retriever : object
        Any runnable from a text to documents: ours, LangChain's own, or
        ``any_vector_store.as_retriever()``.
    llm : object
        :class:`.ChatSGLangRag`, bound or not, gets the documents as chunks, in the order that its
        ``document_order`` says. Any other chat model gets them as text.
    system_prompt, question_template : str
        As for :class:`rag_pipeline.PromptBuilder`; the template's field is ``{question}``.

    Examples
    --------
    >>> rag = RagRunnable(retriever=store.as_retriever(), llm=ChatSGLangRag())  # doctest: +SKIP
    >>> rag.invoke("What is a decorator?", k=3)["answer"]  # doctest: +SKIP
    """

    retriever: Any = Field(exclude=True)
    llm: Any
    system_prompt: str = DEFAULT_SYSTEM
    question_template: str = DEFAULT_QUESTION_TEMPLATE

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    @field_validator("retriever", "llm")
    @classmethod
    def _check_runnable(cls, value: Any) -> Any:
        if not isinstance(value, Runnable):
            raise ValueError(
                f"{type(value).__name__} is no LangChain runnable; give a retriever such as "
                "store.as_retriever(), and a chat model"
            )
        return value

    def invoke(
        self,
        input: Question,  # noqa: A002 (LangChain's name)
        config: RunnableConfig | None = None,
        *,
        k: int | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Answer one question.

        Parameters
        ----------
        input : Question
            See the class.
        config : RunnableConfig, optional
            Callbacks, tags, metadata, run name; handed to retriever and model.
        k : int, optional
            Documents to retrieve; the retriever's own number when None.
        **kwargs
            For the model, such as ``max_tokens``, ``stop`` or ``memory``.

        Raises
        ------
        RagPipelineError
            An empty question, or one that does not fit the context.
        """
        return self._call_with_config(self._invoke, input, config, k=k, **kwargs)

    async def ainvoke(
        self,
        input: Question,  # noqa: A002
        config: RunnableConfig | None = None,
        *,
        k: int | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Answer one question without blocking the event loop; as :meth:`invoke`."""
        return await self._acall_with_config(self._ainvoke, input, config, k=k, **kwargs)

    def stream(
        self,
        input: Question,  # noqa: A002
        config: RunnableConfig | None = None,
        **kwargs: Any,
    ) -> Iterator[dict[str, Any]]:
        """Answer piece by piece; parameters as for :meth:`invoke`."""
        yield from self.transform(iter([input]), config, **kwargs)

    async def astream(
        self,
        input: Question,  # noqa: A002
        config: RunnableConfig | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[dict[str, Any]]:
        """Answer piece by piece without blocking the event loop; as :meth:`stream`."""

        async def once() -> AsyncIterator[Question]:
            yield input

        async for piece in self.atransform(once(), config, **kwargs):
            yield piece

    def transform(
        self,
        input: Iterator[Question],  # noqa: A002
        config: RunnableConfig | None = None,
        **kwargs: Any,
    ) -> Iterator[dict[str, Any]]:
        """Answer a question that comes in pieces, piece by piece."""
        yield from self._transform_stream_with_config(input, self._transform, config, **kwargs)

    async def atransform(
        self,
        input: AsyncIterator[Question],  # noqa: A002
        config: RunnableConfig | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[dict[str, Any]]:
        """As :meth:`transform`, without blocking the event loop."""
        async for piece in self._atransform_stream_with_config(
            input, self._atransform, config, **kwargs
        ):
            yield piece

    # -- the steps; LangChain hands each the config of its own run ------------------------------

    def _invoke(
        self,
        given: Question,
        run_manager: CallbackManagerForChainRun,
        config: RunnableConfig,
        *,
        k: int | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        question, history = _read(given)
        documents = self.retriever.invoke(question, config, **_k(k))
        messages, extra = self._ask(question, history, documents)
        return _result(question, documents, self.llm.invoke(messages, config, **extra, **kwargs))

    async def _ainvoke(
        self,
        given: Question,
        run_manager: AsyncCallbackManagerForChainRun,
        config: RunnableConfig,
        *,
        k: int | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        question, history = _read(given)
        documents = await self.retriever.ainvoke(question, config, **_k(k))
        messages, extra = self._ask(question, history, documents)
        message = await self.llm.ainvoke(messages, config, **extra, **kwargs)
        return _result(question, documents, message)

    def _transform(
        self,
        given: Iterator[Question],
        run_manager: CallbackManagerForChainRun,
        config: RunnableConfig,
        *,
        k: int | None = None,
        **kwargs: Any,
    ) -> Iterator[dict[str, Any]]:
        question, history = _read(_join(list(given)))
        documents = self.retriever.invoke(question, config, **_k(k))
        yield AddableDict(question=question, documents=documents)
        messages, extra = self._ask(question, history, documents)
        for message in self.llm.stream(messages, config, **extra, **kwargs):
            yield from _pieces(message)

    async def _atransform(
        self,
        given: AsyncIterator[Question],
        run_manager: AsyncCallbackManagerForChainRun,
        config: RunnableConfig,
        *,
        k: int | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[dict[str, Any]]:
        question, history = _read(_join([piece async for piece in given]))
        documents = await self.retriever.ainvoke(question, config, **_k(k))
        yield AddableDict(question=question, documents=documents)
        messages, extra = self._ask(question, history, documents)
        async for message in self.llm.astream(messages, config, **extra, **kwargs):
            for piece in _pieces(message):
                yield piece

    def _ask(
        self, question: str, history: Sequence[BaseMessage], documents: Sequence[Document]
    ) -> tuple[list[BaseMessage], dict[str, Any]]:
        text = self.question_template.format(question=question)
        extra: dict[str, Any] = {"documents": list(documents)}
        if not _takes_documents(self.llm):
            text = written(documents, DEFAULT_CHUNK_TEMPLATE, DEFAULT_CONTEXT_HEADER) + text
            extra = {}
        head = [SystemMessage(self.system_prompt)] if self.system_prompt else []
        return [*head, *history, HumanMessage(text)], extra


def _takes_documents(llm: Any) -> bool:
    while not isinstance(llm, BaseChatModel) and hasattr(llm, "bound"):
        llm = llm.bound
    return isinstance(llm, ChatSGLangRag)


def _read(given: Question) -> tuple[str, Sequence[BaseMessage]]:
    history: Any = ()
    question: Any = given
    if isinstance(given, dict):
        unknown = set(given) - {"question", "chat_history"}
        if unknown or "question" not in given:
            raise RagPipelineError(
                f"the input has the keys {', '.join(map(str, given)) or 'none'}; give question, "
                "and chat_history for a conversation"
            )
        question, history = given["question"], given.get("chat_history") or ()
    if not isinstance(question, str) or not question.strip():
        raise RagPipelineError("the question is empty; give at least one word")
    if not all(isinstance(message, BaseMessage) for message in history):
        raise RagPipelineError("chat_history must hold LangChain messages")
    return question.strip(), history


def _join(pieces: list[Any]) -> Question:
    if not pieces:
        return ""
    whole: Any = pieces[0]
    for piece in pieces[1:]:
        whole = whole + piece if isinstance(whole, str) else AddableDict(whole) + piece
    joined: Question = whole
    return joined


def _k(k: int | None) -> dict[str, int]:
    return {} if k is None else {"k": k}


def _pieces(message: BaseMessage) -> Iterator[dict[str, Any]]:
    if message.text:
        yield AddableDict(answer=str(message.text))
    if RAG_KEY in message.response_metadata:
        yield AddableDict(rag=message.response_metadata[RAG_KEY])


def _result(question: str, documents: list[Document], message: BaseMessage) -> dict[str, Any]:
    return AddableDict(
        question=question,
        documents=documents,
        answer=str(message.text),
        rag=message.response_metadata.get(RAG_KEY, {}),
    )
