"""EPIC's LegoLink (arXiv 2410.15332): recompute the first tokens of every chunk, attention sinks where they stand alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from chunk_cache.policies.base import Policy, check_ratio
from chunk_cache.policies.layout import ReuseLayout


@dataclass(frozen=True, kw_only=True, slots=True)
class EpicConfig:
    """Options of :class:`EpicPolicy`."""

    ratio: float = 0.15
    """Share of the reused tokens that is computed."""
    first_tokens: int | None = None
    """Fixed number of tokens per chunk (the paper's LegoLink-k, up to 32); replaces the ratio."""

    def __post_init__(self) -> None:
        check_ratio(self.ratio)
        if self.first_tokens is not None and self.first_tokens < 0:
            raise ValueError(f"first_tokens is {self.first_tokens}; it must be 0 or more.")


class EpicPolicy(Policy):
    """The first k tokens of every chunk (LegoLink), k as large as the budget allows; no pass is needed.

    Paper: EPIC, arXiv 2410.15332. Deviation: the paper fixes k; here k follows from the ratio, one number for
    all chunks, and the remainder goes one token each to the first chunks that are long enough.
    """

    name = "epic"
    config_type = EpicConfig
    config: EpicConfig

    def select(self, layout: ReuseLayout) -> Tensor:
        """First tokens of each span."""
        first = self._first(layout)
        parts = [
            torch.arange(start, start + k)
            for (start, _), k in zip(layout.spans, first, strict=True)
        ]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)

    def _first(self, layout: ReuseLayout) -> list[int]:
        lengths = [end - start for start, end in layout.spans]
        if self.config.first_tokens is not None:
            return [min(n, self.config.first_tokens) for n in lengths]
        budget = int(self.config.ratio * layout.num_reused + 1e-6)
        low, high = 0, max(lengths, default=0)
        while low < high:
            mid = (low + high + 1) // 2
            if sum(min(n, mid) for n in lengths) <= budget:
                low = mid
            else:
                high = mid - 1
        first = [min(n, low) for n in lengths]
        left = budget - sum(first)
        for i, n in enumerate(lengths):
            if left > 0 and n > first[i]:
                first[i] += 1
                left -= 1
        return first
