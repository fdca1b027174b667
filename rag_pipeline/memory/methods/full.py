"""The whole history, as it is: what a memory is measured against."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rag_pipeline.memory.layout import plain_candidate
from rag_pipeline.memory.methods.base import MemoryMethod

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rag_pipeline.memory.conversation import View
    from rag_pipeline.memory.layout import Question
    from rag_pipeline.memory.plan import Candidate


class FullHistory(MemoryMethod):
    """No budget: the prompt grows with the conversation, up to the context."""

    name = "full"

    def candidates(self, view: View, question: Question) -> Sequence[Candidate]:
        """One; of a history that does not fit the context, the end that does."""
        room = question.room - len(view.prefix_ids)
        return [
            plain_candidate(view, question, [(max(0, view.num_tokens - room), view.num_tokens)])
        ]
