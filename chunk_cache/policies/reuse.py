"""Recompute nothing: cached chunks are only moved to their new positions (full KV reuse)."""

from __future__ import annotations

import torch
from torch import Tensor

from chunk_cache.policies.base import NoOptions, Policy
from chunk_cache.policies.layout import ReuseLayout


class ReusePolicy(Policy):
    """No reused token is computed; the lower bound of work and of fidelity."""

    name = "reuse"
    config_type = NoOptions
    ratio = 0.0

    def select(self, layout: ReuseLayout) -> Tensor:
        """No position."""
        return torch.empty(0, dtype=torch.int64)
