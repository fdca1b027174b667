"""CacheBlend's loading controller (arXiv 2405.16444): recompute what hides behind loading, or more where KV deviates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from chunk_cache.policies.base import check_ratio, top_positions
from chunk_cache.policies.cacheblend import CacheBlendConfig, CacheBlendPolicy
from chunk_cache.policies.layout import ReuseLayout
from chunk_cache.policies.scored import ScoredPolicy
from chunk_cache.policies.signals.deviation import DeviationSignal


def balance_ratio(prefill_s: float, load_s: float) -> float:
    """Return the ratio at which recomputing takes as long as loading (``r * prefill_s == load_s``), at most 1."""
    if prefill_s <= 0:
        return 1.0
    return min(1.0, max(0.0, load_s / prefill_s))


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaptiveConfig:
    """Options of :class:`AdaptivePolicy`."""

    ratio: float = 0.15
    """The least ratio (the paper's r*), and the ratio where nothing was measured."""
    max_ratio: float = 0.5
    """The largest ratio that balance or deviation may ask for."""
    coverage: float = 0.5
    """Share of the summed deviation that the recomputed tokens must hold; 0 leaves the ratio to the balance."""
    metric: Literal["k", "v", "kv"] = "kv"
    """What deviates."""

    def __post_init__(self) -> None:
        check_ratio(self.ratio)
        check_ratio(self.max_ratio, "max_ratio")
        check_ratio(self.coverage, "coverage")
        if self.max_ratio < self.ratio:
            raise ValueError(f"max_ratio {self.max_ratio} is below ratio {self.ratio}; raise it.")


class AdaptivePolicy(ScoredPolicy):
    """CacheBlend's loading controller, then its deviation.

    The ratio is ``max(r*, r)`` with ``T_recompute(r) = T_load`` (CacheBlend, arXiv 2405.16444, section 5.1), where
    ``layout`` carries both times: the engine measures how fast it computes and how fast each tier reads. Without them
    the planned ratio is ``r*``. It is never above ``max_ratio`` (ours). At the check layer the ratio is raised until the selected
    tokens hold ``coverage`` of the total deviation. That step is ours. Tokens are chosen by deviation, once, at layer 1.
    """

    name = "adaptive"
    config_type = AdaptiveConfig
    config: AdaptiveConfig

    def signal(self, layout: ReuseLayout) -> DeviationSignal:
        """Deviation at layer 1."""
        return self._base(self.ratio).signal(layout)

    def planned_ratio(self, layout: ReuseLayout) -> float:
        """Return the ratio that holds before any deviation is known."""
        if layout.prefill_s is None or layout.load_s is None:
            return self.config.ratio
        balanced = balance_ratio(layout.prefill_s, layout.load_s)
        return min(self.config.max_ratio, max(self.config.ratio, balanced))

    def _base(self, ratio: float) -> CacheBlendPolicy:
        return CacheBlendPolicy(
            CacheBlendConfig(ratio=ratio, metric=self.config.metric, num_check_layers=1)
        )

    def num_selected(self, layout: ReuseLayout) -> tuple[int, ...]:
        """Count what the planned ratio pays for."""
        return self._base(self.planned_ratio(layout)).num_selected(layout)

    def choose(
        self, layout: ReuseLayout, scores: Tensor, candidates: Tensor, stage: int = 0
    ) -> Tensor:
        """Take the tokens that deviate most, as many as planned or as the coverage needs."""
        count = self.num_selected(layout)[0]
        ceiling = self._base(self.config.max_ratio).num_selected(layout)[0]
        if self.config.coverage > 0 and scores.numel():
            falling = torch.sort(torch.nan_to_num(scores.double()), descending=True).values
            held = falling.cumsum(0)
            needed = int((held < self.config.coverage * held[-1]).sum()) + 1
            count = max(count, min(needed, ceiling))
        return top_positions(scores, candidates, count)

    def computed_row_layers(self, layout: ReuseLayout, kept: Sequence[int] | None = None) -> float:
        """As CacheBlend with one check; hand in ``kept``, the plan does not know the deviation."""
        return self._base(self.planned_ratio(layout)).computed_row_layers(layout, kept)
