"""A memory on a backend, with the packaged sentence model; and when an answer waits for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rag_pipeline.generation import Backend
    from rag_pipeline.memory import Chain, Memory, MemoryConfig, MemoryPlan
    from rag_pipeline.prompts.tokenizer import ModelTokenizer

EMBEDDER = "all-minilm-l6-v2"
"""Embeds what is said, where no index has an embedder."""


def open_memory(config: MemoryConfig, backend: Backend, tokenizer: ModelTokenizer) -> Memory:
    """Make a memory of the conversations with a backend's model.

    Parameters
    ----------
    config : MemoryConfig
        Method and budget.
    backend : Backend
        Builds the records; not closed by the memory.
    tokenizer : ModelTokenizer
        Of its model.

    Raises
    ------
    RagPipelineError
        A budget that the backend's context has no room for.
    """
    from rag_pipeline.memory import Memory, Planner
    from rag_pipeline.models import resolve_embedder
    from retrievers import Embedder

    embedder = Embedder(resolve_embedder(EMBEDDER).path, name=EMBEDDER)
    planner = Planner(
        config, tokenizer, embedder.encode_documents, context_length=backend.context_length
    )
    return Memory(planner, backend)


def awaited(memory: Memory, plan: MemoryPlan) -> Sequence[Chain]:
    """Chains that an answer must wait for: those of a conversation of which no record is there.

    Such a conversation began before it had a memory. A sliding window would forget all that is before it, without a word;
    to compute it once takes about as long as to prefill it.
    """
    needs = [one.needs for one in plan.candidates]
    known = memory.builder.is_known
    if not needs[0] or any(all(map(known, one)) for one in needs):
        return ()
    there = memory.builder.find([name for one in needs for name in one])
    if any(there.issuperset(one) for one in needs):
        return ()
    return min(plan.candidates, key=lambda one: len(one.needs)).chains
