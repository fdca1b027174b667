"""Recompute everything: ordinary prefill behind the exact prefix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from chunk_cache.policies.base import Policy, Signal
from chunk_cache.policies.layout import ReuseLayout


@dataclass(frozen=True, kw_only=True, slots=True)
class FullConfig:
    """No options."""


class FullPolicy(Policy):
    """Every reused token is computed; the reference of every comparison."""

    name: ClassVar[str] = "full"
    config_type: ClassVar[type[Any]] = FullConfig
    signal: ClassVar[Signal] = "none"
    config: FullConfig

    def __init__(self, config: FullConfig) -> None:
        self.config = config

    @property
    def ratio(self) -> float:
        """1."""
        return 1.0

    def num_selected(self, layout: ReuseLayout) -> tuple[int, ...]:
        """All."""
        return (layout.num_reused,)

    def select(
        self,
        layout: ReuseLayout,
        *,
        scores: Tensor | None = None,
        candidates: Tensor | None = None,
        stage: int = 0,
    ) -> Tensor:
        """All reused positions."""
        return layout.reused_positions()

    def computed_row_layers(self, layout: ReuseLayout, kept: Sequence[int] | None = None) -> float:
        """All of them."""
        return float(layout.num_reused * layout.num_layers)
