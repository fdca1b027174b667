"""Recompute everything: ordinary prefill behind the exact prefix."""

from __future__ import annotations

from torch import Tensor

from chunk_cache.policies.base import NoOptions, Policy
from chunk_cache.policies.layout import ReuseLayout


class FullPolicy(Policy):
    """Every reused token is computed; the reference of every comparison."""

    name = "full"
    config_type = NoOptions
    ratio = 1.0

    def select(self, layout: ReuseLayout) -> Tensor:
        """All reused positions."""
        return layout.reused_positions()
