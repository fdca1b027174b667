"""What a model's chat template writes around the turns of a conversation: the one reader of templates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rag_pipeline.errors import RagPipelineError
from rag_pipeline.prompts.segments import Segment, SegmentEncoder
from rag_pipeline.prompts.tokenizer import ModelTokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatTurn:
    """One turn of a conversation.

    Parameters
    ----------
    role : str
        As the model's chat template names it.
    parts : tuple of Segment
        Texts and chunks of the turn; no templates.
    """

    role: str
    parts: tuple[Segment, ...]


def conversation_segments(
    tokenizer: ModelTokenizer, messages: Sequence[ChatTurn]
) -> tuple[list[Segment], int]:
    """Write a conversation with the model's own chat template.

    Parameters
    ----------
    tokenizer : ModelTokenizer
        The model's tokenizer.
    messages : sequence of ChatTurn
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
    rendered = template_parts(tokenizer, [turn.role for turn in turns])
    if rendered is None and turns[0].role == "system" and len(turns) > 1:
        instruction = (*turns[0].parts, Segment(text="\n\n"))
        turns[1] = ChatTurn(role=turns[1].role, parts=(*instruction, *turns[1].parts))
        turns = turns[1:]
        rendered = template_parts(tokenizer, [turn.role for turn in turns])
    if rendered is None:
        if template_parts(tokenizer, ["user"]) is not None:
            roles = ", ".join(message.role for message in messages)
            raise RagPipelineError(
                f"the model's chat template refuses a conversation of the roles {roles}; begin "
                "with system or user, and let user and assistant take turns"
            )
        # A base model: plain text, with a cue to answer.
        rendered = [tokenizer.bos_token or "", *["\n\n"] * (len(turns) - 1), ""]
        turns[-1] = ChatTurn(
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


def template_parts(
    tokenizer: ModelTokenizer, roles: Sequence[str], *, opening: bool = True
) -> list[str] | None:
    """Read from the chat template what it writes around turns of these roles.

    Parameters
    ----------
    tokenizer : ModelTokenizer
        The model's tokenizer.
    roles : sequence of str
        Of the turns, in order.
    opening : bool
        Whether the last piece ends with the opening of an answer.

    Returns
    -------
    list of str or None
        The pieces before each turn and behind the last; None where the model has no template, or
        one that refuses these roles or loses a turn.
    """
    from jinja2 import TemplateError

    # Letters only: no template escapes or strips them.
    marks = [f"RAGPART{_letters(index)}MARK" for index in range(len(roles))]
    messages = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
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
    return "".join(chr(ord("A") + int(digit)) for digit in str(number))
