"""Retrieval of messages by sentence vectors and words: what most programs do today with a long conversation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rag_pipeline.memory.layout import plain_candidate
from rag_pipeline.memory.matching import recalled
from rag_pipeline.memory.methods.base import MemoryMethod

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rag_pipeline.memory.conversation import View
    from rag_pipeline.memory.layout import Question
    from rag_pipeline.memory.plan import Candidate


class TurnRetrieval(MemoryMethod):
    """The messages closest to the question, up to the budget, in the order of the conversation, then the recent ones.

    The recent ones are those that stand behind the newest record of the other methods, and the message that they begin in.
    """

    name = "retrieval"

    def candidates(self, view: View, question: Question) -> Sequence[Candidate]:
        """One."""
        recent = view.message_at(view.num_blocks * view.config.block_tokens)
        start = view.message_range(recent - 1)[1] if recent else 0
        room = question.room - len(view.prefix_ids) - (view.num_tokens - start)
        chosen = recalled(view, question, start, min(view.config.budget_tokens, room))
        told = [*(view.message_range(message) for message in chosen), (start, view.num_tokens)]
        return [plain_candidate(view, question, told)]
