"""What the study compares: rules, and ways to apply EpiCache's."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from chunk_cache.retention import create_rule, layer_budgets
from rag_eval.errors import EvalError
from rag_eval.retention.model import LayerCache, ShownModel
from rag_eval.retention.reference import (
    Level,
    ReferenceMemory,
    build_memory,
    patched_scores,
    rule_scores,
)
from rag_eval.retention.talk import Talk
from rag_pipeline.memory.probes import repeat_probe
from rag_pipeline.memory.rendering import Renderer


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """A way to keep tokens. By default EpiCache as the engine does it: every layer and head alike."""

    rule: str = "epicache"
    level: Level = "pair-uniform"
    alpha: float = 0.0
    """Exponent of the layers' weights; 0 for uniform layers."""
    shuffled: bool = False
    """Weights of the layers in random order: as uneven, without meaning."""
    system_competes: bool = False
    """The system part is part of the history, and its tokens are added to the budget."""
    own_share: float = 0.0
    """Share of the budget in which the episode's own tokens stay before others."""
    system_in_softmax: bool = False
    """The system part's keys take part in the rule's softmax, though they stay anyway."""


VARIANTS = {
    "epicache": Variant(),
    "epicache-own": Variant(own_share=1.0),
    "epicache-own0.75": Variant(own_share=0.75),
    "epicache-own0.5": Variant(own_share=0.5),
    "epicache-system-softmax": Variant(system_in_softmax=True),
    "epicache-system-competes": Variant(system_competes=True),
    "epicache-first4": Variant(rule="epicache:first=4"),
    "epicache-first16": Variant(rule="epicache:first=16"),
    "epicache-layers1.1": Variant(alpha=1.1),
    "epicache-layers1.3": Variant(alpha=1.3),
    "epicache-layers-shuffled": Variant(alpha=1.1, shuffled=True),
    "epicache-pair": Variant(level="pair"),
    "kvzip": Variant(rule="kvzip"),
    "snapkv": Variant(rule="snapkv"),
    "keydiff": Variant(rule="keydiff"),
    "streaming": Variant(rule="streaming"),
    "random": Variant(rule="random"),
}


def variant_named(name: str) -> Variant:
    """Look a variant up; one line where there is none of that name."""
    if name not in VARIANTS:
        raise EvalError(f"variant {name!r} is not known; choose some of {', '.join(VARIANTS)}")
    return VARIANTS[name]


def budgets_of(
    variant: Variant, sensitivity: Sequence[float], budget: int, seed: int = 0
) -> tuple[int, ...]:
    """Tokens of each layer."""
    found = list(layer_budgets(sensitivity, budget, alpha=variant.alpha))
    if variant.shuffled:
        random.Random(seed).shuffle(found)
    return tuple(found)


def build(
    variant: Variant,
    model: ShownModel,
    talk: Talk,
    renderer: Renderer,
    full: Sequence[LayerCache],
    budgets: Sequence[int],
    *,
    block_tokens: int,
) -> list[ReferenceMemory]:
    """Build the memories of a conversation: one per episode where the rule asks with a patched prompt.

    Parameters
    ----------
    variant : Variant
        Which.
    model, talk, renderer : object
        What it is built with.
    full : sequence of LayerCache
        Of the system part and the whole history, computed without eviction: blocks that fit every layer's budget are
        taken from it.
    budgets : sequence of int
        Tokens of each layer.
    block_tokens : int
        Tokens of a block.
    """
    rule = create_rule(variant.rule)
    prefix = len(talk.system)
    system, history = talk.system, talk.history
    fits = min(min(budgets) // block_tokens * block_tokens, len(history))
    if variant.system_competes:  # the grid of the blocks stays
        system, history = (), (*system, *history)
        budgets = [one + prefix for one in budgets]
    known = [one.part(0 if variant.system_competes else prefix, prefix + fits) for one in full]

    def probe_of(patched: Sequence[int], block: int) -> Sequence[int]:
        if rule.probe == "repeat":
            first = block * block_tokens
            return repeat_probe(renderer, talk.history[first : first + block_tokens])
        return patched if rule.probe == "patched" else ()

    return [
        build_memory(
            model,
            system,
            history,
            partial(probe_of, patched),
            patched_scores if variant.level == "pair" else rule_scores(rule),
            block_tokens=block_tokens,
            budgets=budgets,
            level=variant.level,
            window_rows=rule.window_rows,
            pinned=rule.pinned,
            system_in_softmax=variant.system_in_softmax,
            start=known,
            own=talk.own[episode].__getitem__ if variant.own_share else None,
            own_share=variant.own_share,
        )
        for episode, patched in enumerate(
            talk.probes if rule.probe == "patched" else talk.probes[:1]
        )
    ]
