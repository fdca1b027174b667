"""EpiCache's block-wise prefill with eviction (arXiv 2509.17396), as published and as the engine does it.

The history comes in blocks at its true positions. Each block runs behind what was kept, a probe runs behind the block,
its queries score every key, and the best stay. Kept keys never move, so nothing is rotated twice.

Levels of eviction, as the released code calls them:

* ``pair-uniform``: the best ``M`` of each head;
* ``pair``: the best ``M * H`` of all heads of a layer together, so that heads keep different numbers.

A layer may have its own ``M``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from chunk_cache.retention import RetentionRule, keep_own, keep_top, own_columns, own_free
from rag_eval.errors import EvalError
from rag_eval.retention.model import LayerCache, LayerRows, Pass, ShownModel, joined

Level = Literal["pair", "pair-uniform"]


class Scores(Protocol):
    """A rule: scores ``[H, n]`` of a cache by the rows of a probe; padding scores below everything."""

    def __call__(self, cache: LayerCache, queries: Tensor | None, next_position: int) -> Tensor:
        """``queries`` are ``[Q, R, D]``, or None where there is no probe."""


def patched_scores(cache: LayerCache, queries: Tensor | None, next_position: int) -> Tensor:
    """Score by the published rule: the largest softmax weight over probe rows and query heads of the group."""
    assert queries is not None
    heads, _, size = cache.k.shape
    q = queries.float().reshape(heads, -1, size)  # query heads of a group and rows together
    logits = q @ cache.k.float().transpose(1, 2) / size**0.5
    logits = logits.masked_fill((cache.positions < 0)[:, None], float("-inf"))
    return logits.softmax(-1).amax(1).masked_fill(cache.positions < 0, float("-inf"))


def rule_scores(rule: RetentionRule) -> Scores:
    """Score by a rule of this project; heads must keep equal numbers."""

    def score(cache: LayerCache, queries: Tensor | None, next_position: int) -> Tensor:
        return rule.scores(
            cache.k.transpose(0, 1),
            cache.v.transpose(0, 1),
            None if queries is None else queries.transpose(0, 1).contiguous(),
            cache.positions,
            next_position,
        )

    return score


def keep_pair(scores: Tensor, budget: int, pinned: Tensor) -> tuple[Tensor, Tensor]:
    """Columns of the best ``budget * H`` of all heads together, padded, and how many each head has.

    Returns
    -------
    columns : Tensor
        int64 ``[H, m]``, ``m`` the largest number; those of a head rise, then comes padding.
    counts : Tensor
        int64 ``[H]``, whose sum is ``budget * H`` at most.
    """
    heads, n = scores.shape
    flat = scores.masked_fill(pinned, float("inf")).flatten()
    some = torch.isfinite(flat) | pinned.flatten()
    take = min(budget * heads, int(some.sum()))
    best = flat.sort(descending=True, stable=True).indices[:take]
    kept = torch.zeros(heads * n, dtype=torch.bool)
    kept[best] = True
    kept = kept.view(heads, n)
    counts = kept.sum(1)
    # Stable: what is kept comes first, in the order in which it stands.
    columns = torch.sort((~kept).to(torch.uint8), dim=1, stable=True).indices[
        :, : int(counts.max())
    ]
    return columns, counts


@dataclass(frozen=True, kw_only=True, slots=True)
class ReferenceMemory:
    """What is left of a history.

    Attributes
    ----------
    system : list of LayerCache
        The system part, which stays whole; empty where there is none.
    kept : list of LayerCache
        Per layer.
    next_position : int
        True position of the token that follows.
    peak : tuple of int
        Per layer, most keys per head (their mean, for ``pair``) at any time, system part and probe apart.
    """

    system: list[LayerCache]
    kept: list[LayerCache]
    next_position: int
    peak: tuple[int, ...]

    @property
    def caches(self) -> list[LayerCache]:
        """System part and memory as one."""
        return joined(self.system, self.kept)

    def answer(self, model: ShownModel, ids: Sequence[int], *, logits: int = 1) -> Pass:
        """Run what follows the history: tail, question, answer."""
        return model.forward(ids, self.next_position, self.caches, logits=logits)


def build_memory(
    model: ShownModel,
    system: Sequence[int],
    history: Sequence[int],
    probe: Callable[[int], Sequence[int]],
    score: Scores,
    *,
    block_tokens: int,
    budgets: Sequence[int],
    level: Level = "pair-uniform",
    window_rows: int = 0,
    pinned: Callable[[Tensor, int], Tensor] | None = None,
    system_in_softmax: bool = False,
    start: Sequence[LayerCache] = (),
    own: Callable[[int], Sequence[tuple[int, int]]] | None = None,
    own_share: float = 1.0,
) -> ReferenceMemory:
    """Build a memory block by block.

    Parameters
    ----------
    model : ShownModel
        Which computes.
    system : sequence of int
        Tokens in front of the history that never compete. To let them compete, make them part of the history.
    history : sequence of int
        Whole blocks.
    probe : callable
        Token ids of the probe behind a block, by the block's number; empty where the rule has none.
    score : Scores
        The rule.
    block_tokens : int
        Tokens of a block.
    budgets : sequence of int
        Tokens per KV head that each layer keeps.
    level : {"pair", "pair-uniform"}
        Whether heads of a layer compete with each other.
    window_rows : int
        Where the probe is empty: last rows of the block whose queries score.
    pinned : callable, optional
        ``pinned(positions, next_position)``, bool ``[H, n]``: what stays whatever its score.
    system_in_softmax : bool
        Whether the system's keys take part in the rule's softmax.
    start : sequence of LayerCache
        The history's first blocks, computed elsewhere and not evicted from; they must fit the budgets.
    own : callable, optional
        Spans of true positions that stay before others, by the block's number; for ``pair-uniform``.
    own_share : float
        Share of the budget in which they do.
    """
    done = start[0].k.shape[1] if start else 0
    if (len(history) - done) % block_tokens or len(budgets) != model.num_layers:
        raise EvalError(
            f"{len(history) - done} tokens, {len(budgets)} budgets; give whole blocks of {block_tokens} and "
            f"{model.num_layers} budgets"
        )
    whole = (
        [LayerCache.of_rows(rows, 0) for rows in model.forward(system, 0).layers] if system else []
    )
    kept = list(start)
    peak = [done] * model.num_layers
    for first in range(done, len(history), block_tokens):
        position = len(system) + first
        block = history[first : first + block_tokens]
        rows = model.forward(block, position, joined(whole, kept)).layers
        kept = joined(kept, [LayerCache.of_rows(one, position) for one in rows])
        position += block_tokens
        peak = [max(a, _size(cache)) for a, cache in zip(peak, kept, strict=True)]
        asked = list(probe(first // block_tokens))
        mine = own(first // block_tokens) if own is not None else ()
        if asked:
            rows = model.forward(asked, position, joined(whole, kept)).layers
        elif window_rows:
            rows = [LayerRows(q=one.q[:, -window_rows:], k=one.k, v=one.v) for one in rows]
        for layer, cache in enumerate(kept):
            if _size(cache) <= budgets[layer]:
                continue
            queries = rows[layer].q if asked or window_rows else None
            seen = whole[layer] + cache if whole and system_in_softmax else cache
            scores = score(seen, queries, position)[:, seen.k.shape[1] - cache.k.shape[1] :]
            stays = torch.zeros_like(scores, dtype=torch.bool)
            if pinned is not None:
                stays = pinned(cache.positions, position) & (cache.positions >= 0)
            if level == "pair":
                kept[layer] = cache.take(*keep_pair(scores, budgets[layer], stays))
            elif mine:
                free = own_free(budgets[layer], own_share)
                columns = own_columns(cache.positions, mine)
                kept[layer] = cache.take(keep_own(scores, budgets[layer], columns, free, stays))
            else:
                kept[layer] = cache.take(keep_top(scores, budgets[layer], stays))
    return ReferenceMemory(
        system=whole, kept=kept, next_position=len(system) + len(history), peak=tuple(peak)
    )


def _size(cache: LayerCache) -> int:
    """Keys per head, rounded up where heads differ."""
    heads: int = cache.k.shape[0]
    return -(-int((cache.positions >= 0).sum()) // heads)
