"""Retrieval of messages by sentence vectors: what most programs do today with a long conversation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from rag_pipeline.memory.layout import plain_candidate
from rag_pipeline.memory.methods.base import MemoryMethod
from rag_pipeline.prompts.builder import fitting

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
        ranges = [view.message_range(message) for message in range(recent)]
        chosen: list[int] = []
        if ranges:
            near = np.stack(view.message_vectors(recent)) @ question.vector
            best = np.argsort(-near, kind="stable")
            room = question.room - len(view.prefix_ids) - (view.num_tokens - ranges[-1][1])
            lengths = [ranges[message][1] - ranges[message][0] for message in best]
            kept = fitting(lengths, min(view.config.budget_tokens, room))
            chosen = sorted(int(best[place]) for place in kept)
        start = ranges[-1][1] if ranges else 0
        told = [*(ranges[message] for message in chosen), (start, view.num_tokens)]
        return [plain_candidate(view, question, told)]
