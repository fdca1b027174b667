"""KVzip (arXiv 2505.23416) as a memory: what is needed to say each block again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rag_pipeline.memory.chains import Recipe
from rag_pipeline.memory.methods.chained import ChainedMethod
from rag_pipeline.memory.probes import repeat_probe

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rag_pipeline.memory.conversation import View
    from rag_pipeline.memory.layout import Question

_INSTRUCTION_TOKENS = 64


class KVzip(ChainedMethod):
    """The probe is the block itself behind a request to repeat it: a step computes about twice the block.

    Deviation: see :class:`chunk_cache.retention.kvzip.KVzipRule`. https://arxiv.org/abs/2505.23416.
    """

    name = "kvzip"

    def recipes(self, view: View, question: Question | None) -> Sequence[Recipe]:
        """One record for the whole conversation."""
        renderer = view.renderer
        return [
            Recipe(key=self.rule, rule=self.rule, probe=lambda block: repeat_probe(renderer, block))
        ]

    def probe_tokens(self) -> int:
        """An instruction and the block."""
        return _INSTRUCTION_TOKENS + self.config.block_tokens
