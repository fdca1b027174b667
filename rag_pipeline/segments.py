"""Prompts of any shape as token ids: conversations and programs with chunks anywhere in them.

:mod:`rag_pipeline.prompt_layout` lays out one system part, chunks and one question. A conversation
has more turns and a program more branches, so here a prompt is a sequence of segments. The rules
are the same: a chunk is tokenised alone, everything between two chunks in one go, and only what a
template wrote may hold control tokens. A prompt of the first shape gets the same ids either way.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from rag_pipeline.encoded_texts import EncodedTexts
from rag_pipeline.errors import RagPipelineError
from rag_pipeline.tokenizer import ModelTokenizer
from rag_pipeline.types import Span

Kind = Literal["text", "template", "chunk"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """A run of a prompt.

    Parameters
    ----------
    text
        As it stands in the prompt.
    kind
        ``text``: special-token strings are ordinary characters. ``template``: they are control
        tokens. ``chunk``: as ``text``, tokenised alone, and its KV may be reused.
    chunk_id
        Name of a chunk, for reports.
    """

    text: str
    kind: Kind = "text"
    chunk_id: str | None = None


class SegmentEncoder:
    """Segments to token ids and chunk spans.

    Parameters
    ----------
    tokenizer
        The model's tokenizer.
    cache_size
        Number of chunks whose ids are kept.
    """

    def __init__(self, tokenizer: ModelTokenizer, *, cache_size: int = 4096) -> None:
        self.tokenizer = tokenizer
        self._texts = EncodedTexts(tokenizer, cache_size)

    def chunk_ids(self, text: str) -> tuple[int, ...]:
        """Token ids of a chunk's text, alone."""
        return self._texts.ids(text)

    def encode(self, segments: Iterable[Segment]) -> tuple[tuple[int, ...], tuple[Span, ...]]:
        """Lay out a prompt.

        Parameters
        ----------
        segments
            In prompt order.

        Returns
        -------
        tuple
            Token ids, and one span for each chunk that has any.
        """
        ids: list[int] = []
        spans: list[Span] = []
        runs: list[tuple[str, bool]] = []
        for segment in segments:
            if segment.kind != "chunk":
                runs.append((segment.text, segment.kind == "template"))
                continue
            ids += self.tokenizer.encode_runs(runs)
            runs = []
            start = len(ids)
            ids += self.chunk_ids(segment.text)
            if len(ids) > start:
                spans.append(Span(start=start, end=len(ids), chunk_id=segment.chunk_id))
        ids += self.tokenizer.encode_runs(runs)
        return tuple(ids), tuple(spans)


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One turn of a conversation.

    Parameters
    ----------
    role
        As the model's chat template names it.
    parts
        Texts and chunks of the turn; no templates.
    """

    role: str
    parts: tuple[Segment, ...]


def conversation_segments(
    tokenizer: ModelTokenizer, messages: Sequence[Message]
) -> tuple[list[Segment], int]:
    """Write a conversation with the model's own chat template.

    Parameters
    ----------
    tokenizer
        The model's tokenizer.
    messages
        The turns. A system turn is put before the first other turn where the template has no
        system role.

    Returns
    -------
    tuple
        The segments, with the opening of the answer; and how many of them stand before the first
        turn that is not the system's, which is the part that conversations share.

    Raises
    ------
    RagPipelineError
        A conversation that the template refuses.
    """
    turns = list(messages)
    if not turns:
        raise RagPipelineError("the conversation is empty; give at least one message")
    rendered = rendered_parts(tokenizer, turns)
    if rendered is None and turns[0].role == "system" and len(turns) > 1:
        instruction = (*turns[0].parts, Segment(text="\n\n"))
        turns[1] = Message(role=turns[1].role, parts=(*instruction, *turns[1].parts))
        turns = turns[1:]
        rendered = rendered_parts(tokenizer, turns)
    if rendered is None:
        if rendered_parts(tokenizer, [Message(role="user", parts=())]) is not None:
            roles = ", ".join(message.role for message in messages)
            raise RagPipelineError(
                f"the model's chat template refuses a conversation of the roles {roles}; begin "
                "with system or user, and let user and assistant take turns"
            )
        # A base model: plain text, with a cue to answer.
        rendered = [tokenizer.bos_token or "", *["\n\n"] * (len(turns) - 1), ""]
        turns[-1] = Message(
            role=turns[-1].role, parts=(*turns[-1].parts, Segment(text="\nAnswer:"))
        )
    segments: list[Segment] = []
    shared = 0
    for turn, before in zip(turns, rendered, strict=False):
        segments.append(Segment(text=before, kind="template"))
        if not shared and turn.role != "system":
            shared = len(segments)
        segments += turn.parts
    segments.append(Segment(text=rendered[-1], kind="template"))
    return segments, shared


def shared_prefix_len(encoder: SegmentEncoder, ids: Sequence[int], head: Sequence[Segment]) -> int:
    """Tokens at the start of `ids` that the segments `head` decide, whatever follows them."""
    alone, _ = encoder.encode(head)
    same = 0
    for ours, theirs in zip(alone, ids, strict=False):
        if ours != theirs:
            break
        same += 1
    return same


def rendered_parts(
    tokenizer: ModelTokenizer, turns: Sequence[Message], *, opening: bool = True
) -> list[str] | None:
    """What the chat template writes around the turns.

    Parameters
    ----------
    tokenizer
        The model's tokenizer.
    turns
        Only their roles matter.
    opening
        Whether the last piece ends with the opening of an answer.

    Returns
    -------
    list of str or None
        The pieces before each turn and behind the last; None where the model has no template, or
        one that refuses these roles or loses a turn.
    """
    from jinja2 import TemplateError

    marks = [f"RAGPART{_letters(index)}MARK" for index in range(len(turns))]
    messages: list[dict[str, str]] = [
        {"role": turn.role, "content": mark} for turn, mark in zip(turns, marks, strict=True)
    ]
    try:
        text = tokenizer.render_chat(messages, opening=opening)
    except TemplateError:
        return None
    if text is None or any(text.count(mark) != 1 for mark in marks):
        return None
    pieces = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found:  # the turns changed places
            return None
        pieces.append(before)
    return [*pieces, text]


def _letters(number: int) -> str:
    """Write a number in letters: no template escapes or strips them."""
    return "".join(chr(ord("A") + int(digit)) for digit in str(number))
