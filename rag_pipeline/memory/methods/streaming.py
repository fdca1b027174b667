"""StreamingLLM (arXiv 2309.17453) as a memory: the first tokens and the latest."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rag_pipeline.memory.chains import Recipe
from rag_pipeline.memory.methods.chained import ChainedMethod

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rag_pipeline.memory.conversation import View
    from rag_pipeline.memory.layout import Question


class UnprobedMethod(ChainedMethod):
    """A record whose rule needs no text behind the block."""

    def recipes(self, view: View, question: Question | None) -> Sequence[Recipe]:
        """One record for the whole conversation."""
        return [Recipe(key=self.rule, rule=self.rule, probe=_no_probe)]

    def probe_tokens(self) -> int:
        """None."""
        return 0


class Streaming(UnprobedMethod):
    """Keeps attention sinks and a sliding window. https://arxiv.org/abs/2309.17453."""

    name = "streaming"


def _no_probe(block_ids: Sequence[int]) -> tuple[int, ...]:
    return ()
