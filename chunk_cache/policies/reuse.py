"""Recompute nothing: cached chunks are only moved to their new positions (full KV reuse)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from chunk_cache.policies.base import Policy, Signal
from chunk_cache.policies.layout import ReuseLayout


@dataclass(frozen=True, kw_only=True, slots=True)
class ReuseConfig:
    """No options."""


class ReusePolicy(Policy):
    """No reused token is computed; the lower bound of work and of fidelity."""

    name: ClassVar[str] = "reuse"
    config_type: ClassVar[type[Any]] = ReuseConfig
    signal: ClassVar[Signal] = "none"
    config: ReuseConfig

    def __init__(self, config: ReuseConfig) -> None:
        self.config = config

    @property
    def ratio(self) -> float:
        """0."""
        return 0.0

    def num_selected(self, layout: ReuseLayout) -> tuple[int, ...]:
        """None."""
        return (0,)

    def select(
        self,
        layout: ReuseLayout,
        *,
        scores: Tensor | None = None,
        candidates: Tensor | None = None,
        stage: int = 0,
    ) -> Tensor:
        """No position."""
        return torch.empty(0, dtype=torch.int64)

    def computed_row_layers(self, layout: ReuseLayout, kept: Sequence[int] | None = None) -> float:
        """None."""
        return 0.0
