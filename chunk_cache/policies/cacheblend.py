"""CacheBlend: recompute the tokens whose KV deviates most, found at check layers with gradual filtering."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any, ClassVar, Literal

from torch import Tensor

from chunk_cache.policies.base import Policy, Signal, check_ratio, top_positions
from chunk_cache.policies.layout import ReuseLayout

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


class CacheBlendPolicy(Policy):
    """High-KV-deviation tokens with gradual filtering.

    Layer 0 is computed for every token, and K and V of layer 1 too; the tokens that deviate most go on, and
    each further check layer keeps fewer of those. Paper: CacheBlend, arXiv 2405.16444, section 4.

    Deviations: the paper gives no schedule, here the kept counts fall linearly over the check layers and are
    as large as the budget allows. ``released`` follows the published code's selection (squared difference of V,
    once, at layer 1; all K and V of layers 0 and 1 fresh) but not its mask, which lets selected tokens see
    later keys, nor its treatment of the question, which it may leave stale.
    """

    name: ClassVar[str] = "cacheblend"
    config_type: ClassVar[type[Any]] = CacheBlendConfig
    signal: ClassVar[Signal] = "deviation"
    config: CacheBlendConfig

    def __init__(self, config: CacheBlendConfig) -> None:
        self.config = config

    @property
    def ratio(self) -> float:
        """Nominal ratio."""
        return self.config.ratio

    @property
    def metric(self) -> Literal["k", "v", "kv"]:
        """V for the released variant, else as configured."""
        return "v" if self.config.released else self.config.metric

    @property
    def mean_shift(self) -> float:
        """As configured."""
        return self.config.mean_shift

    def check_layers(self, num_layers: int) -> tuple[int, ...]:
        """Layers 1 .. n, as far as the model has them; a model of one layer is checked at layer 0."""
        wanted = 1 if self.config.released else self.config.num_check_layers
        return tuple(range(1, min(wanted, num_layers - 1) + 1)) or (0,)

    def _counts(self, layout: ReuseLayout, last: int) -> tuple[int, ...]:
        stages = len(self.check_layers(layout.num_layers))
        spread = self.config.filter_spread
        factors = [1 + spread * (stages - 1 - i) / max(1, stages - 1) for i in range(stages)]
        return tuple(min(layout.num_reused, ceil(f * last - 1e-9)) for f in factors)

    def num_selected(self, layout: ReuseLayout) -> tuple[int, ...]:
        """Kept counts after each check layer: the largest falling schedule that the budget pays for.

        All 0 where the budget does not even pay for the check: then nothing is checked (plain reuse). At ratio 1
        nothing is checked either: every token is computed, and a check would come on top.
        """
        reused = layout.num_reused
        if self.ratio >= 1.0:
            return (reused,) * len(self.check_layers(layout.num_layers))
        if not self.config.charge_overhead:
            # The schedule averages to the ratio over the check layers, as the paper words it.
            stages = len(self.check_layers(layout.num_layers))
            mean = 1 + self.config.filter_spread / 2 if stages > 1 else 1.0
            return self._counts(layout, int(self.ratio * reused / mean + 1e-6))
        budget = self.ratio * reused * layout.num_layers + 1e-6
        low, high = 0, reused
        while low < high:
            mid = (low + high + 1) // 2
            if self._work(layout, self._counts(layout, mid)) <= budget:
                low = mid
            else:
                high = mid - 1
        return self._counts(layout, low)

    def select(
        self,
        layout: ReuseLayout,
        *,
        scores: Tensor | None = None,
        candidates: Tensor | None = None,
        stage: int = 0,
    ) -> Tensor:
        """Take the candidates that deviate most."""
        if scores is None and not self.needs_signal(layout):
            return layout.reused_positions()[: self.num_selected(layout)[-1]]
        if scores is None:
            raise ValueError(
                "cacheblend selects by deviation: give scores (rag_kernels.kv_deviation)."
            )
        positions = layout.reused_positions() if candidates is None else candidates
        return top_positions(scores, positions, self.num_selected(layout)[stage])

    def computed_row_layers(self, layout: ReuseLayout, kept: Sequence[int] | None = None) -> float:
        """Whole layers and QKV shares, layer by layer."""
        counts = tuple(kept) if kept is not None else self.num_selected(layout)
        if kept is None and not self.needs_signal(layout):
            return float(counts[-1] * layout.num_layers)
        return self._work(layout, counts)

    def _work(self, layout: ReuseLayout, counts: tuple[int, ...]) -> float:
        layers = self.check_layers(layout.num_layers)
        if layout.probes_restart:
            before = (layout.num_reused, *counts[:-1])
            probes = sum(
                (layer + layout.qkv_share) * (rows + layout.scoring_rows)
                for layer, rows in zip(layers, before, strict=True)
            )
            return probes + layout.num_layers * counts[-1]
        checks = dict(zip(layers, counts, strict=True))
        rows, total = float(layout.num_reused), 0.0
        for layer in range(layout.num_layers):
            after = float(checks.get(layer, rows))
            total += layout.qkv_share * rows + (1 - layout.qkv_share) * after
            rows = after
        return total
