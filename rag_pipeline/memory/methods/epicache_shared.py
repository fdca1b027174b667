"""EpiCache's episodes over one copy of the whole history's KV: cheap to build, but the whole history is held while building."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rag_pipeline.memory.chains import Recipe, WholeChain
from rag_pipeline.memory.methods.epicache import EpiCache

if TYPE_CHECKING:
    from rag_pipeline.memory.conversation import View
    from rag_pipeline.memory.plan import Chain


class SharedEpiCache(EpiCache):
    """One prefill of the whole history, which the radix tree keeps, and a scoring pass per episode.

    Not EpiCache's own KV: no token's hidden states have seen an eviction. It costs one prefill instead of one per episode, and
    memory that grows with the history while records are made; see :class:`.EpiCache` for the rest.
    """

    name = "epicache-shared"
    rule_name = "epicache"

    def chain(self, view: View, recipe: Recipe, blocks: int) -> Chain:
        """One step over all blocks."""
        return WholeChain(view, recipe, blocks)
