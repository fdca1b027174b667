"""Prompts of answers: ``[prefix][slots][repeated messages][tail][question]``, and what becomes of it without a record."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from rag_pipeline.memory.matching import near_segments
from rag_pipeline.memory.plan import Candidate, Chain, Range
from rag_pipeline.protocol import FusionRequest, MemoryFields, MemoryLoad

if TYPE_CHECKING:
    from rag_pipeline.memory.clustering import Vectors
    from rag_pipeline.memory.conversation import View
    from rag_pipeline.memory.matching import Scores


@dataclass(kw_only=True)
class Question:
    """The new user message.

    Parameters
    ----------
    view : View
        The history that it is asked behind.
    text : str
        As asked.
    ids : tuple of int
        Its tokens, with the opening of the answer.
    room : int
        Most tokens of prefix and history in front of it.
    encode : callable
        Text to its sentence vector.
    """

    view: View
    text: str
    ids: tuple[int, ...]
    room: int
    encode: Callable[[str], Vectors]

    @cached_property
    def vector(self) -> Vectors:
        """Its sentence vector, ``(dim,)``; computed when it is asked for first."""
        return self.encode(self.text)

    @cached_property
    def near_segments(self) -> Scores:
        """How near each whole segment of the history is, ``(segments,)``; computed when it is asked for first."""
        return near_segments(self.view, self.text, self.vector)


def plain_candidate(view: View, question: Question, ranges: Sequence[Range]) -> Candidate:
    """Lay out a prompt without a memory: ranges of the history's tokens, in order, as they are."""
    prefix = len(view.prefix_ids)
    told = tuple(token for start, end in ranges for token in view.ids(start, end))
    return Candidate(
        input_ids=(*view.prefix_ids, *told, *question.ids),
        fusion=FusionRequest(prefix_len=prefix),
        verbatim=_verbatim(prefix, ranges),
        prefix_len=prefix,
        tail_len=len(told),
    )


def window_candidate(view: View, question: Question) -> Candidate:
    """Lay out a sliding window: what the newest record's prompt becomes where the record is missing.

    It begins where the slots' tokens begin, so it moves by blocks, and turns within a block share it.
    """
    end = view.num_tokens
    behind = view.num_blocks * view.config.block_tokens
    start = max(0, behind - view.config.budget_tokens)
    start = max(start, end - (question.room - len(view.prefix_ids)))
    return plain_candidate(view, question, [(start, end)])


def memory_candidate(
    view: View,
    question: Question,
    chains: Sequence[Chain],
    blocks: int,
    repeated: Sequence[Range] = (),
) -> Candidate:
    """Lay out a prompt with one record, or with two that the engine merges.

    Parameters
    ----------
    view : View
        The history.
    question : Question
        The new message.
    chains : sequence of Chain
        What makes the records, the best episode first.
    blocks : int
        Blocks of the history that the records have seen; the tokens behind them are the tail.
    repeated : sequence of (int, int)
        Tokens of the history that stand between record and tail as they are, in order.
    """
    prefix, seen = len(view.prefix_ids), blocks * view.config.block_tokens
    slots = view.config.slots(seen)
    by_id = {chain.ids[-1]: chain for chain in chains}  # records of two episodes may be one
    load = tuple(MemoryLoad(start=prefix, end=prefix + slots, id=one) for one in by_id)
    told = [*repeated, (seen, view.num_tokens)]
    shown = tuple(token for start, end in told for token in view.ids(start, end))
    again = sum(end - start for start, end in repeated)
    return Candidate(
        input_ids=(
            *view.prefix_ids,
            *view.ids(seen - slots, seen),
            *shown,
            *question.ids,
        ),
        fusion=FusionRequest(prefix_len=prefix, memory=MemoryFields(load=load)),
        needs=tuple(by_id),
        chains=tuple(by_id.values()),
        verbatim=_verbatim(prefix, told),
        prefix_len=prefix,
        slots=slots,
        repeated_len=again,
        tail_len=len(shown) - again,
        episodes=tuple(chain.episode for chain in by_id.values()),
    )


def _verbatim(prefix: int, ranges: Sequence[Range]) -> tuple[Range, ...]:
    return tuple((prefix + start, prefix + end) for start, end in ranges if end > start)
