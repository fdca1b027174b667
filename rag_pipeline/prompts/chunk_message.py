"""Chunks and a question as one message of a conversation, for prompts whose history is a memory.

There the chunks stand behind the history, with the question, and are computed with it: KV that was kept behind the
system part alone is not that of a chunk behind a conversation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rag_pipeline.prompts.builder import PromptBuilder
from rag_pipeline.prompts.history import question_part
from rag_pipeline.types import PromptLayout, Span
from retrievers.types import SearchHit


@dataclass(frozen=True, kw_only=True, slots=True)
class ChunkMessage:
    """A message with chunks.

    Parameters
    ----------
    text : str
        All of it.
    edges : tuple of int
        Characters at which each chunk begins and the question begins.
    chunks, dropped : tuple of SearchHit
        Those in it, in order, and those that had no room, best first.
    """

    text: str
    edges: tuple[int, ...]
    chunks: tuple[SearchHit, ...]
    dropped: tuple[SearchHit, ...]


def write_message(
    builder: PromptBuilder,
    question: str,
    hits: Sequence[SearchHit],
    *,
    max_new_tokens: int,
    context_length: int,
    told_tokens: int,
    rules: str = "",
    document_order: str | None = None,
) -> ChunkMessage:
    """Write the last message of a prompt.

    Parameters
    ----------
    builder : PromptBuilder
        Its templates.
    question : str
        As asked.
    hits : sequence of SearchHit
        Retrieved chunks.
    max_new_tokens : int
        Room for the answer, tokens.
    context_length : int
        Most tokens of prompt and answer together.
    told_tokens : int
        Tokens that the history takes.
    rules : str
        Stands in front of the question.
    document_order : str, optional
        Overrides the builder's.

    Returns
    -------
    ChunkMessage
        With as many chunks as there is room for beside the history.
    """
    asked = question_part(builder.asked(question.strip()), (), rules)
    behind = len(builder.tokenizer.encode_runs([(asked, False), *builder.closing]))
    limit = min(builder.context_length, context_length)
    room = limit - max_new_tokens - len(builder.system_ids) - told_tokens - behind
    kept, dropped = builder.choose(hits, max(0, room), document_order, behind=behind)
    text, edges = builder.context_header if kept else "", []
    for hit in kept:
        edges.append(len(text))
        text += builder.chunk_text(hit.chunk)
    edges.append(len(text))
    return ChunkMessage(
        text=text + asked, edges=tuple(edges), chunks=tuple(kept), dropped=tuple(dropped)
    )


def lay_out_message(
    builder: PromptBuilder, message: ChunkMessage, input_ids: tuple[int, ...]
) -> PromptLayout:
    """Find the parts of a prompt that ends with a message; the history stands with the system part.

    An edge may be a token off where a token reaches over it: the message is tokenised as one text.
    """
    encode, closing = builder.tokenizer.encode_runs, builder.closing
    places = [
        len(input_ids) - len(encode([(message.text[edge:], False), *closing]))
        for edge in message.edges
    ]
    spans = [Span(start=0, end=places[0])]
    for hit, start, end in zip(message.chunks, places, places[1:], strict=False):
        spans.append(Span(start=start, end=max(start, end), chunk_id=hit.chunk.id))
    return PromptLayout(
        input_ids=input_ids,
        system_span=spans[0],
        chunk_spans=tuple(spans[1:]),
        question_span=Span(start=places[-1], end=len(input_ids)),
        text=builder.tokenizer.decode(input_ids),
        chunks=message.chunks,
        dropped=message.dropped,
    )
