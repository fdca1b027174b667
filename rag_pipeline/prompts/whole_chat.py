"""A conversation as one prompt, all of it; where it outgrows the context its oldest turns are cut."""

from __future__ import annotations

from collections.abc import Sequence

from rag_pipeline.errors import RagPipelineError
from rag_pipeline.prompts.chat_template import ChatTurn, conversation_segments
from rag_pipeline.prompts.history import HistoryMessage, turns_of
from rag_pipeline.prompts.segments import Segment, SegmentEncoder
from rag_pipeline.prompts.truncation import estimated_tokens, first_that_fits, truncated
from rag_pipeline.types import Truncated


def whole_chat(
    encoder: SegmentEncoder,
    system: str,
    history: Sequence[HistoryMessage],
    question: str,
    *,
    max_new_tokens: int,
    context_length: int,
) -> tuple[tuple[int, ...], Truncated]:
    """Lay out a conversation with the model's chat template.

    Parameters
    ----------
    encoder : SegmentEncoder
        Of the model's tokenizer.
    system : str
        Stands in front and is never cut; empty for none.
    history : sequence of HistoryMessage
        Earlier messages, the oldest first.
    question : str
        The new message.
    max_new_tokens : int
        Room to leave for the answer, tokens.
    context_length : int
        Most tokens of prompt and answer together.

    Returns
    -------
    tuple
        Token ids, and what was cut (:mod:`.truncation`).

    Raises
    ------
    RagPipelineError
        A message that does not fit even alone, or a conversation that the template refuses.
    """
    turns = turns_of(history)
    encode = encoder.tokenizer.encode
    lengths = [sum(estimated_tokens(message.text, encode) for message in turn) for turn in turns]
    head = [_turn("system", system)] if system else []
    limit = context_length - max_new_tokens

    def lay_out(cut: int) -> tuple[int, ...]:
        said = [_turn(message.role, message.text) for turn in turns[cut:] for message in turn]
        segments, _ = conversation_segments(
            encoder.tokenizer, [*head, *said, _turn("user", question)]
        )
        return encoder.encode(segments)[0]

    ids, cut = first_that_fits(
        lengths, lay_out, lambda made: len(made) <= limit, context_length=context_length
    )
    if len(ids) > limit:
        raise RagPipelineError(
            f"the message does not fit: {len(ids)} tokens with what must stand beside it, and {max_new_tokens} "
            f"for the answer, exceed the context of {context_length}; shorten it, or let the answer have fewer tokens"
        )
    return ids, truncated(lengths, cut)


def _turn(role: str, text: str) -> ChatTurn:
    return ChatTurn(role=role, parts=(Segment(text=text),))
