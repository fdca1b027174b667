"""Query-driven selection, as ProphetKV (arXiv 2602.02579): recompute what the question, and a draft answer, attend to."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from chunk_cache.policies.base import check_ratio, top_positions
from chunk_cache.policies.epic import EpicConfig, EpicPolicy
from chunk_cache.policies.layout import ReuseLayout
from chunk_cache.policies.scored import ScoredPolicy
from chunk_cache.policies.signals.attention import AttentionSignal
from rag_kernels import to_device

_LEAST_SHARE_BEHIND_DRAFT = 0.5
"""Share of the budget's tokens that must be left for a draft to be worth its pass."""

_LEAST_SHARE = 0.2
"""Share of the budget's tokens that must be left behind the scoring pass. On the models measured, tokens chosen by
the question are worth about five times as many that are chosen without it."""


MAX_DRAFT_TOKENS = 64
"""Longer drafts than a phrase are guesses."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QueryConfig:
    """Options of :class:`QueryPolicy`."""

    ratio: float = 0.15
    """Budget: share of the reused tokens' full computation, scoring pass included."""
    first_layer: float = 0.5
    """Depth at which scores begin, as a share of the layers."""
    stop_layer: float = 0.8
    """Depth at which the scoring pass ends, as a share of the layers."""
    first_share: float = 0.25
    """Share of the tokens that the question chooses which goes to the first ones of every chunk, unscored."""
    draft_tokens: int = 4
    """Tokens of a draft answer that score beside the question: the first is decoded over the loaded KV, the others
    are looked up behind it in the chunks. 0 for none."""
    draft_share: float = 0.3
    """Share of the tokens to recompute that the draft chooses, among those that the question has not."""
    pool: int = 1
    """Scores are averaged over this many neighbouring tokens of a chunk; 1 for none."""
    mean_shift: float = 0.4
    """Strength of the mean shift on tokens that stay cached; 0 for none."""

    def __post_init__(self) -> None:
        check_ratio(self.ratio)
        check_ratio(self.first_share, "first_share")
        check_ratio(self.draft_share, "draft_share")
        check_ratio(self.mean_shift, "mean_shift")
        if not 0.0 <= self.first_layer < self.stop_layer <= 1.0:
            raise ValueError(
                f"first_layer {self.first_layer} and stop_layer {self.stop_layer} must satisfy "
                "0 <= first_layer < stop_layer <= 1."
            )
        if not 0 <= self.draft_tokens <= MAX_DRAFT_TOKENS:
            raise ValueError(
                f"draft_tokens is {self.draft_tokens}; it must be between 0 (none) and {MAX_DRAFT_TOKENS}."
            )
        if self.pool < 1:
            raise ValueError(f"pool is {self.pool}; it must be at least 1.")


class QueryPolicy(ScoredPolicy):
    """Tokens with the largest attention mass from the question, and from a draft of the answer, over the middle layers.

    The fresh rows run over the loaded KV through layers ``0 .. 0.8 L``; the mass is the mean over question rows,
    heads and layers ``0.5 L .. 0.8 L``. Same family as ProphetKV (arXiv 2602.02579) and A3 (arXiv 2511.17560), which
    score all layers, or one; the middle layers measured best here. A quarter of the tokens goes to the first ones of
    every chunk (EPIC, arXiv 2410.15332): on the sets measured it changed the mean little and the worst answers much,
    those whose words are a chunk's title.

    The question's rows look for the place of the answer; the answer's own rows look at what is copied from there. So
    a draft of four tokens scores too (pseudo queries, Lookahead Q-Cache, arXiv 2505.20334): the first is the likeliest
    one over the loaded KV, the others are those behind its most attended occurrence in the chunks. It chooses the last
    three tenths of the tokens, among those that the question left: the two masses are not added, because a draft that
    is wrong has as much of it as one that is right.

    The scoring pass costs ``0.8 L`` for every fresh row, whatever the number of reused tokens; with a draft ``L``, and
    ``0.8 L`` for every token of it, so it is left out where less than half of the budget would remain. Where a prompt reuses
    so little that less than a fifth of the budget would be left for tokens, and where no question stands behind
    the last chunk, nothing is scored: the whole budget goes to the first tokens of every chunk (EPIC), without
    mean shift, because first tokens move more than the rest and would shift it too far.
    """

    name = "query"
    config_type = QueryConfig
    config: QueryConfig

    def __init__(self, config: QueryConfig) -> None:
        super().__init__(config)
        self._fallback = EpicPolicy(EpicConfig(ratio=config.ratio))

    def signal(self, layout: ReuseLayout) -> AttentionSignal:
        """Attention of the middle layers, at least one.

        With a draft where it may choose and at least half of the budget is left behind it.
        """
        stop = max(1, ceil(self.config.stop_layer * layout.num_layers - 1e-9))
        first = int(self.config.first_layer * layout.num_layers + 1e-9)
        layers = range(min(first, stop - 1), stop)
        if self.config.draft_share:
            drafting = AttentionSignal(layers, self.config.draft_tokens)
            least = _LEAST_SHARE_BEHIND_DRAFT * self.ratio * layout.num_reused
            if self._left(layout, drafting) >= least:
                return drafting
        return AttentionSignal(layers)

    def needs_signal(self, layout: ReuseLayout) -> bool:
        """Answer False without a question, at ratio 1, and where scoring would eat the budget."""
        if layout.question_len == 0 or self.ratio >= 1.0:
            return False
        bought = self.ratio * layout.num_reused
        return self._count(layout) >= max(1.0, _LEAST_SHARE * bought)

    def shift_strength(self, layout: ReuseLayout) -> float:
        """As configured for scored tokens, 0 for the first tokens of chunks."""
        return self.config.mean_shift if self.needs_signal(layout) else 0.0

    def _count(self, layout: ReuseLayout) -> int:
        """Tokens that the budget leaves behind the scoring passes."""
        return self._left(layout, self.signal(layout))

    def _left(self, layout: ReuseLayout, signal: AttentionSignal) -> int:
        budget = self.ratio * layout.num_reused * layout.num_layers - signal.cost(layout)
        return max(0, min(layout.num_reused, int(budget / layout.num_layers + 1e-6)))

    def num_selected(self, layout: ReuseLayout) -> tuple[int, ...]:
        """Count what the budget leaves after the scoring pass, or buys without one."""
        if self.needs_signal(layout):
            return (self._count(layout),)
        return self._fallback.num_selected(layout)

    def select(self, layout: ReuseLayout) -> Tensor:
        """Take the first tokens of every chunk where nothing is scored."""
        if self.needs_signal(layout):
            return super().select(layout)
        return self._fallback.select(layout)

    def choose(
        self, layout: ReuseLayout, scores: Tensor, candidates: Tensor, stage: int = 0
    ) -> Tensor:
        """Take the tokens with the largest mass: the question's, then the draft's among what is left.

        So a wrong draft costs no more than its share.
        """
        count = self._count(layout)
        if scores.ndim == 1:
            return self._by_question(layout, scores, candidates, count)
        asking, drafted = scores
        of_draft = int(self.config.draft_share * count)
        positions = to_device(candidates, scores.device)
        asked = self._by_question(layout, asking, positions, count - of_draft)
        # Masked, not picked out: how many are left need not be read from the device.
        taken = torch.isin(positions, asked, assume_unique=True)
        rest = self._pooled(drafted, layout).masked_fill(taken, float("-inf"))
        more = top_positions(rest, positions, of_draft)
        return torch.cat([asked, more]).sort().values

    def _by_question(
        self, layout: ReuseLayout, scores: Tensor, positions: Tensor, count: int
    ) -> Tensor:
        scores = self._with_firsts(self._pooled(scores, layout), layout, count)
        return top_positions(scores, positions, count)

    def _with_firsts(self, scores: Tensor, layout: ReuseLayout, count: int) -> Tensor:
        """Put the first tokens of every chunk above all others, as many as their share buys."""
        each = int(self.config.first_share * count / max(1, len(layout.spans)))
        if each == 0:
            return scores
        out, lo = scores.clone(), 0
        for start, end in layout.spans:
            out[lo : lo + min(each, end - start)] = float("inf")
            lo += end - start
        return out

    def _pooled(self, scores: Tensor, layout: ReuseLayout) -> Tensor:
        if self.config.pool == 1:
            return scores
        out, lo = torch.empty_like(scores), 0
        for start, end in layout.spans:
            hi = lo + end - start
            for block in range(lo, hi, self.config.pool):
                stop = min(block + self.config.pool, hi)
                out[block:stop] = scores[block:stop].mean()
            lo = hi
        return out
