"""Texts whose queries decide what stays: the patched prompt of an episode, and a block said again."""

from __future__ import annotations

from collections.abc import Sequence

from rag_pipeline.memory.rendering import Renderer

PATCHED_INSTRUCTION = (
    "\n\nFrom this conversation, list who takes part, what happened and when, and the facts, plans, promises, "
    "opinions and feelings that matter."
)
"""In front of an episode's own text. EpiCache has such a sentence; this one is our own."""

REPEAT_INSTRUCTION = "\n\nRepeat the text above word for word."
"""In front of a block that is said again (KVzip)."""


def patched_probe(renderer: Renderer, texts: Sequence[str], room: int) -> tuple[int, ...]:
    """Lay out the patched prompt of an episode: an instruction, the opening of an answer, and the episode's segments.

    Parameters
    ----------
    renderer : Renderer
        Of the model.
    texts : sequence of str
        Segments in the order of the conversation; none before the first clustering.
    room : int
        Most tokens. Text that does not fit is cut at its end.
    """
    tokenizer = renderer.tokenizer
    asked = tokenizer.encode_runs([(PATCHED_INSTRUCTION, False), renderer.opening])
    told = tokenizer.encode("\n".join(texts)) if texts else []
    return tuple((asked + told)[: max(room, len(asked))])


def repeat_probe(renderer: Renderer, block_ids: Sequence[int]) -> tuple[int, ...]:
    """Lay out the request to repeat a block, and the block."""
    asked = renderer.tokenizer.encode_runs([(REPEAT_INSTRUCTION, False), renderer.opening])
    return (*asked, *block_ids)
