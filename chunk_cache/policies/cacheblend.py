"""CacheBlend (arXiv 2405.16444): recompute the tokens whose KV deviates most, filtered check layer by check layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Literal

from torch import Tensor

from chunk_cache.policies.base import check_ratio, top_positions
from chunk_cache.policies.layout import ReuseLayout
from chunk_cache.policies.scored import ScoredPolicy
from chunk_cache.policies.signals.deviation import DeviationSignal

# A request may set them: each check layer is a pass over the prompt, and counts must stay finite.
_MAX_CHECK_LAYERS = 16
_MAX_SPREAD = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheBlendConfig:
    """Options of :class:`CacheBlendPolicy`."""

    ratio: float = 0.15
    """Budget: share of the reused tokens' full computation."""
    metric: Literal["k", "v", "kv"] = "kv"
    """What deviates; ignored with ``released``, which uses V."""
    num_check_layers: int = 3
    """Check layers 1 .. n of gradual filtering; 1 selects once."""
    filter_spread: float = 0.5
    """The first check keeps ``1 + spread`` times as many tokens as the last."""
    released: bool = False
    """The authors' published code instead of the paper: V only, one selection at layer 1."""
    charge_overhead: bool = True
    """Take the full layer 0 and layer 1's QKV out of the budget; False keeps ``ratio`` of the tokens."""
    mean_shift: float = 0.0
    """Strength of the mean shift on tokens that stay cached; not in the paper."""

    def __post_init__(self) -> None:
        check_ratio(self.ratio)
        check_ratio(self.mean_shift, "mean_shift")
        if self.metric not in ("k", "v", "kv"):
            raise ValueError(f"metric is {self.metric!r}; choose k, v or kv.")
        if not 1 <= self.num_check_layers <= _MAX_CHECK_LAYERS:
            raise ValueError(
                f"num_check_layers is {self.num_check_layers}; it must be at least 1 and at most "
                f"{_MAX_CHECK_LAYERS}."
            )
        if not 0 <= self.filter_spread <= _MAX_SPREAD:  # NaN is refused too
            raise ValueError(
                f"filter_spread is {self.filter_spread}; it must be 0 or more and at most {_MAX_SPREAD}."
            )


class CacheBlendPolicy(ScoredPolicy):
    """High-KV-deviation tokens with gradual filtering.

    Layer 0 is computed for every token, and K and V of layer 1 too; the tokens that deviate most go on, and
    each further check layer keeps fewer of those. Paper: CacheBlend, arXiv 2405.16444, section 4.

    Deviations: the paper gives no schedule, here the kept counts fall linearly over the check layers and are
    as large as the budget allows. ``released`` follows the published code's selection (squared difference of V,
    once, at layer 1; all K and V of layers 0 and 1 fresh) but not its mask, which lets selected tokens see
    later keys, nor its treatment of the question, which it may leave stale.
    """

    name = "cacheblend"
    config_type = CacheBlendConfig
    config: CacheBlendConfig

    def signal(self, layout: ReuseLayout) -> DeviationSignal:
        """Check layers 1 .. n, as far as the model has them; a model of one layer is checked at layer 0."""
        wanted = 1 if self.config.released else self.config.num_check_layers
        layers = tuple(range(1, min(wanted, layout.num_layers - 1) + 1)) or (0,)
        return DeviationSignal(layers, "v" if self.config.released else self.config.metric)

    def shift_strength(self, layout: ReuseLayout) -> float:
        """As configured."""
        return self.config.mean_shift

    def num_selected(self, layout: ReuseLayout) -> tuple[int, ...]:
        """Kept counts after each check layer: the largest falling schedule that the budget pays for.

        All 0 where the budget does not even pay for the check: then nothing is checked (plain reuse). At ratio 1
        nothing is checked either: every token is computed, and a check would come on top.
        """
        reused, signal = layout.num_reused, self.signal(layout)
        stages = len(signal.check_layers)
        if self.ratio >= 1.0:
            return (reused,) * stages
        if not self.config.charge_overhead:
            # The schedule averages to the ratio over the check layers, as the paper words it.
            mean = 1 + self.config.filter_spread / 2 if stages > 1 else 1.0
            return self._schedule(reused, stages, int(self.ratio * reused / mean + 1e-6))
        budget = self.ratio * reused * layout.num_layers + 1e-6
        low, high = 0, reused
        while low < high:
            mid = (low + high + 1) // 2
            if _work(layout, signal, self._schedule(reused, stages, mid)) <= budget:
                low = mid
            else:
                high = mid - 1
        return self._schedule(reused, stages, low)

    def _schedule(self, reused: int, stages: int, last: int) -> tuple[int, ...]:
        """Kept counts that fall linearly to the last one."""
        spread = self.config.filter_spread
        factors = [1 + spread * (stages - 1 - i) / max(1, stages - 1) for i in range(stages)]
        return tuple(min(reused, ceil(f * last - 1e-9)) for f in factors)

    def choose(
        self, layout: ReuseLayout, scores: Tensor, candidates: Tensor, stage: int = 0
    ) -> Tensor:
        """Take the candidates that deviate most."""
        return top_positions(scores, candidates, self.num_selected(layout)[stage])

    def computed_row_layers(self, layout: ReuseLayout, kept: Sequence[int] | None = None) -> float:
        """Whole layers and QKV shares, layer by layer."""
        if not self.needs_signal(layout):
            return super().computed_row_layers(layout, kept)
        counts = self.num_selected(layout) if kept is None else kept
        return _work(layout, self.signal(layout), counts)


def _work(layout: ReuseLayout, signal: DeviationSignal, counts: Sequence[int]) -> float:
    """Row-layers of checks and final pass, or of one pass whose rows shrink at the check layers."""
    if layout.probes_restart:
        return signal.cost(layout, counts) + layout.num_layers * counts[-1]
    checks = dict(zip(signal.check_layers, counts, strict=True))
    rows, total = float(layout.num_reused), 0.0
    for layer in range(layout.num_layers):
        after = float(checks.get(layer, rows))
        total += layout.qkv_share * rows + (1 - layout.qkv_share) * after
        rows = after
    return total
