"""LangChain messages and documents to token ids with chunk spans."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from langchain_core.documents import Document
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage

from rag_pipeline.errors import RagPipelineError
from rag_pipeline.langchain.documents import document_id, document_title
from rag_pipeline.prompts.builder import (
    DEFAULT_CHUNK_TEMPLATE,
    DEFAULT_CONTEXT_HEADER,
    fitting,
)
from rag_pipeline.prompts.chat_template import (
    ChatTurn,
    conversation_segments,
    shared_prefix_len,
)
from rag_pipeline.prompts.document_order import RETRIEVED, check_document_order, ordered
from rag_pipeline.prompts.segments import Segment, SegmentEncoder
from rag_pipeline.prompts.truncation import (
    CUT_SHARE,
    Truncation,
    check_truncation,
    estimated_tokens,
    first_that_fits,
    truncated,
)
from rag_pipeline.types import NOTHING_CUT, Span, Truncated

DOCUMENT_BLOCK = "text-plain"
"""LangChain's content block for a plain text; in a message it is a chunk at that place."""

_ROLES: tuple[tuple[type[BaseMessage], str], ...] = (
    (SystemMessage, "system"),
    (HumanMessage, "user"),
    (AIMessage, "assistant"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatLayout:
    """A conversation as token ids.

    Parameters
    ----------
    input_ids, spans : tuple of int, tuple of Span
        The prompt and its chunks.
    prefix_len : int
        Tokens of the part that chunk KV is computed behind.
    documents : tuple of str
        Ids of the documents in the prompt, in order.
    dropped : tuple of str
        Ids of documents that did not fit, in the order given.
    messages : tuple of BaseMessage
        Those that stand in the prompt.
    truncated : Truncated
        Oldest turns that did not fit.
    """

    input_ids: tuple[int, ...]
    spans: tuple[Span, ...]
    prefix_len: int
    documents: tuple[str, ...]
    dropped: tuple[str, ...]
    messages: tuple[BaseMessage, ...] = ()
    truncated: Truncated = NOTHING_CUT

    @property
    def facts(self) -> dict[str, Any]:
        """What a client is told of the prompt."""
        facts: dict[str, Any] = {"documents": list(self.documents), "dropped": list(self.dropped)}
        return facts | ({"truncated": self.truncated.to_json()} if self.truncated.turns else {})


class ChatLayouter:
    """Lays out conversations for one model.

    Parameters
    ----------
    encoder : SegmentEncoder
        Of the model's tokenizer.
    context_length : int
        Most tokens of prompt and answer together.
    chunk_template, context_header : str
        As for :class:`rag_pipeline.PromptBuilder`.
    cut_share : float
        As for :class:`rag_pipeline.PromptBuilder`.
    document_order : str
        As for :class:`rag_pipeline.PromptBuilder`; of the documents that are given beside the messages.
    """

    def __init__(
        self,
        encoder: SegmentEncoder,
        *,
        context_length: int,
        chunk_template: str = DEFAULT_CHUNK_TEMPLATE,
        context_header: str = DEFAULT_CONTEXT_HEADER,
        cut_share: float = CUT_SHARE,
        document_order: str = RETRIEVED,
    ) -> None:
        check_truncation("auto", cut_share)
        check_document_order(document_order)
        self.encoder = encoder
        self.context_length = context_length
        self._template = chunk_template
        self._header = context_header
        self._cut_share = cut_share
        self._document_order = document_order

    def build(
        self,
        messages: Sequence[BaseMessage],
        documents: Sequence[Document],
        *,
        max_new_tokens: int,
        truncation: Truncation = "auto",
    ) -> ChatLayout:
        """Lay out one request.

        Parameters
        ----------
        messages : sequence of BaseMessage
            The conversation. Documents may also stand in it, as content blocks of type
            ``text-plain``.
        documents : sequence of Document
            Put before the text of the last human message; the best first.
        max_new_tokens : int
            Room to leave for the answer, tokens.
        truncation : str
            ``auto`` cuts the oldest turns of a conversation that does not fit
            (:mod:`rag_pipeline.prompts.truncation`): the system messages at its head and the last
            turn stay. ``disabled`` refuses it.

        Returns
        -------
        ChatLayout
            Documents are taken in order, each that still fits; the others are in `dropped`. Turns
            are cut for documents until those have half of the context.

        Raises
        ------
        RagPipelineError
            Messages that are no text, a conversation that the chat template refuses, or one that
            does not fit even without documents.
        """
        check_truncation(truncation, self._cut_share)
        given = [self._segment(document) for document in documents]
        limit = self.context_length - max_new_tokens
        kept, cut = self._cut(messages, given, limit, truncation)
        layout = self._fit(kept, given, limit)
        return dataclasses.replace(layout, messages=tuple(kept), truncated=cut)

    def _cut(
        self,
        messages: Sequence[BaseMessage],
        documents: Sequence[Segment],
        limit: int,
        truncation: Truncation,
    ) -> tuple[Sequence[BaseMessage], Truncated]:
        """Leave out the oldest turns until the others and their documents have room."""
        head, turns = _turns_of(messages)
        if truncation == "disabled" or len(turns) < 2:
            return messages, NOTHING_CUT
        lengths = [self._tokens_of(turn) for turn in turns[:-1]]
        wanted = sum(len(self.encoder.chunk_ids(part.text)) for part in documents)
        room = limit - min(wanted, self.context_length // 2)

        def left(cut: int) -> list[BaseMessage]:
            return [*head, *(message for turn in turns[cut:] for message in turn)]

        kept, cut = first_that_fits(
            lengths,
            left,
            lambda kept: len(self._lay_out(kept, (), []).input_ids) <= room,
            context_length=self.context_length,
            share=self._cut_share,
        )
        return kept, truncated(lengths, cut)

    def _fit(
        self, messages: Sequence[BaseMessage], given: Sequence[Segment], limit: int
    ) -> ChatLayout:
        """Lay out with as many documents as fit."""
        kept = list(range(len(given)))
        while True:
            dropped = [str(part.chunk_id) for i, part in enumerate(given) if i not in kept]
            layout = self._lay_out(messages, [given[i] for i in kept], dropped)
            excess = len(layout.input_ids) - limit
            if excess <= 0:
                return self._in_order(messages, [given[i] for i in kept], layout)
            if not kept:
                raise RagPipelineError(
                    f"the conversation has {len(layout.input_ids)} tokens and "
                    f"{self.context_length - limit} are kept for the answer; the context holds "
                    f"{self.context_length}: shorten it, or lower max_tokens"
                )
            lengths = [len(self.encoder.chunk_ids(given[i].text)) for i in kept]
            kept = [kept[place] for place in fitting(lengths, sum(lengths) - excess)]

    def _in_order(
        self, messages: Sequence[BaseMessage], documents: Sequence[Segment], layout: ChatLayout
    ) -> ChatLayout:
        """Put the documents of a layout, which are the best first, where the order wants them."""
        # An empty one has no tokens, so it stands nowhere.
        documents = [part for part in documents if self.encoder.chunk_ids(part.text)]
        if self._document_order == RETRIEVED or len(documents) < 2:
            return layout
        lengths = [len(self.encoder.chunk_ids(part.text)) for part in documents]
        texts = [str(part.chunk_id) for part in documents]
        # Messages may hold documents of their own, in front of these or behind them.
        first = next(
            at
            for at in range(len(layout.documents))
            if list(layout.documents[at : at + len(texts)]) == texts
        )
        before = layout.spans[first].start
        places = ordered(
            self._document_order,
            [-float(rank) for rank in range(len(documents))],
            lengths,
            before=before,
            behind=len(layout.input_ids) - before - sum(lengths),
        )
        return self._lay_out(messages, [documents[i] for i in places], list(layout.dropped))

    def _tokens_of(self, turn: Sequence[BaseMessage]) -> int:
        parts = (part.text for message in turn for part in self._parts(message))
        return sum(estimated_tokens(text, self.encoder.tokenizer.encode) for text in parts)

    def _lay_out(
        self, messages: Sequence[BaseMessage], documents: Sequence[Segment], dropped: list[str]
    ) -> ChatLayout:
        turns = [ChatTurn(role=_role(m), parts=self._parts(m)) for m in messages]
        if documents:
            users = [index for index, turn in enumerate(turns) if turn.role == "user"]
            if not users:
                raise RagPipelineError("documents need a human message to stand in; add one")
            header = Segment(text=self._header)
            note = Segment(text=self.encoder.tokenizer.date_note())
            last = turns[users[-1]]
            turns[users[-1]] = ChatTurn(role="user", parts=(header, *documents, note, *last.parts))
        segments, shared = conversation_segments(self.encoder.tokenizer, turns)
        ids, spans = self.encoder.encode(segments)
        # Where the first turn begins with documents, its header belongs to the shared part too.
        head = list(segments[:shared])
        for segment in segments[shared:]:
            if segment.kind == "chunk":
                break
            if segment.text != self._header or segment.kind != "text":
                break
            head.append(segment)
        prefix_len = shared_prefix_len(self.encoder, ids, head)
        return ChatLayout(
            input_ids=ids,
            spans=spans,
            prefix_len=min(prefix_len, spans[0].start) if spans else prefix_len,
            documents=tuple(str(span.chunk_id) for span in spans),
            dropped=tuple(dropped),
        )

    def _segment(self, document: Document) -> Segment:
        text = self._template.format(title=document_title(document), text=document.page_content)
        return Segment(text=text, kind="chunk", chunk_id=document_id(document))

    def _parts(self, message: BaseMessage) -> tuple[Segment, ...]:
        if isinstance(message.content, str):
            return (Segment(text=message.content),)
        parts: list[Segment] = []
        for block in message.content:
            if isinstance(block, str):
                parts.append(Segment(text=block))
            elif block.get("type") == "text":
                parts.append(Segment(text=str(block["text"])))
            elif is_document(block):
                parts.append(self._segment(block_document(block)))
            else:
                raise RagPipelineError(
                    f"a message holds a block of type {block.get('type')!r}; with documents, "
                    f"messages may hold text and {DOCUMENT_BLOCK} only"
                )
        return tuple(parts)


def is_document(block: Any) -> bool:
    """Whether a content block is a document."""
    return isinstance(block, Mapping) and block.get("type") == DOCUMENT_BLOCK


def block_document(block: Mapping[str, Any]) -> Document:
    """Document of a ``text-plain`` block: its ``text``, ``title`` and ``id``."""
    if not isinstance(block.get("text"), str):
        raise RagPipelineError(f"a {DOCUMENT_BLOCK} block has no text; put the document's text in")
    title = block.get("title")
    return Document(
        page_content=block["text"],
        id=block.get("id"),
        metadata={"title": title} if isinstance(title, str) else {},
    )


def has_documents(messages: Sequence[BaseMessage]) -> bool:
    """Whether a document stands in any message."""
    return any(
        is_document(block)
        for message in messages
        if isinstance(message.content, list)
        for block in message.content
    )


def without_documents(messages: Sequence[BaseMessage]) -> list[BaseMessage]:
    """Copies of messages that were laid out, with their own text only."""
    return [
        message.model_copy(update={"content": str(message.text)})
        if isinstance(message.content, list)
        else message
        for message in messages
    ]


def _turns_of(
    messages: Sequence[BaseMessage],
) -> tuple[list[BaseMessage], list[list[BaseMessage]]]:
    """Split into the system messages at the head, and turns that begin with a human message behind an answer."""
    size = next((i for i, m in enumerate(messages) if not isinstance(m, SystemMessage)), 0)
    turns: list[list[BaseMessage]] = []
    for message in messages[size:]:
        begins = isinstance(message, HumanMessage)
        if not turns or (begins and not isinstance(turns[-1][-1], HumanMessage)):
            turns.append([])
        turns[-1].append(message)
    return list(messages[:size]), turns


def _role(message: BaseMessage) -> str:
    for kind, role in _ROLES:
        if isinstance(message, kind):
            if isinstance(message, AIMessage) and message.tool_calls:
                break
            return role
    raise RagPipelineError(
        f"a {type(message).__name__} with tools cannot stand in a conversation with documents; "
        "use system, human and AI messages of text"
    )
