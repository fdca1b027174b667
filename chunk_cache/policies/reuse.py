"""Recompute nothing: cached chunks are only moved to their new positions (full KV reuse)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from chunk_cache.policies.base import Policy
from chunk_cache.policies.layout import ReuseLayout


@dataclass(frozen=True, kw_only=True, slots=True)
class ReuseConfig:
    """No options."""


class ReusePolicy(Policy):
    """No reused token is computed; the lower bound of work and of fidelity."""

    name = "reuse"
    config_type = ReuseConfig
    ratio = 0.0

    def select(self, layout: ReuseLayout) -> Tensor:
        """No position."""
        return torch.empty(0, dtype=torch.int64)
