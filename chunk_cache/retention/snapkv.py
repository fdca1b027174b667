"""SnapKV (arXiv 2404.14469): what the last tokens of the prompt attend to stays, and these tokens themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from chunk_cache.retention.attention import attention_weights
from chunk_cache.retention.base import (
    Candidates,
    RetentionConfig,
    RetentionError,
    RetentionRule,
    check_count,
)

MOST_POOLED = 255
"""Neighbours that are pooled at most: the work of a step grows with them, in the scheduler, and a client names them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SnapKVConfig(RetentionConfig):
    """The window, and how scores of neighbours are pooled."""

    window: int = 64
    """Tokens at the end of the block whose queries score the others."""
    kernel: int = 5
    """Neighbours that are pooled, an odd number; 1 pools nothing."""
    pooling: Literal["avg", "max"] = "avg"
    """How they are pooled."""

    def __post_init__(self) -> None:
        RetentionConfig.__post_init__(self)
        check_count("window", self.window, 1)
        check_count("kernel", self.kernel, 1)
        if self.kernel % 2 == 0 or self.kernel > MOST_POOLED:
            raise ValueError(f"kernel is {self.kernel}; it must be odd, and {MOST_POOLED} at most.")


class SnapKVRule(RetentionRule):
    """Keep the observation window and the tokens that it looks at, by clusters.

    The score of a key in front of the window is the softmax weight that the window's rows give it, averaged over rows
    and the query heads of its group, then pooled over neighbours. The softmax is causal within the window.

    Deviations: the paper compresses one prompt once; here the rule runs after each block, over what was kept and the
    block. Neighbours are those in the cache, so tokens between which others were evicted are pooled. Scores are
    averaged over the group, as implementations for grouped queries do; the paper has a KV head per query head.

    https://arxiv.org/abs/2404.14469
    """

    name = "snapkv"
    probe = "window"
    config_type = SnapKVConfig
    config: SnapKVConfig

    @property
    def window_rows(self) -> int:
        """Rows of the observation window."""
        return self.config.window

    def pinned(self, positions: Tensor, next_position: int) -> Tensor:
        """Pin the window, too."""
        recent = positions >= next_position - self.config.window
        return RetentionRule.pinned(self, positions, next_position) | recent

    def _scores(self, candidates: Candidates) -> Tensor:
        assert candidates.queries is not None
        rows = candidates.queries.shape[0]
        positions, n = candidates.positions, candidates.positions.shape[1]
        own = torch.arange(
            candidates.next_position - rows, candidates.next_position, device=positions.device
        )
        if rows > n or not (positions[:, -rows:] == own).all():
            raise RetentionError(
                f"the last {rows} keys must be those of the window's {rows} queries, "
                f"positions {own[0]} to {own[-1]}"
            )
        total = torch.zeros(positions.shape, dtype=torch.float32, device=positions.device)
        first_hidden = torch.arange(n - rows + 1, n + 1, device=positions.device)
        for weights in attention_weights(candidates.keys, candidates.queries, first_hidden):
            total += weights.mean(2).sum(1)
        past = total[:, : n - rows] / rows
        scores = torch.ones_like(total)  # the window is pinned; no average of weights is larger
        if past.shape[1]:
            scores[:, : n - rows] = self._pooled(past)
        return scores

    def _pooled(self, scores: Tensor) -> Tensor:
        kernel = self.config.kernel
        if self.config.pooling == "max":
            return torch.nn.functional.max_pool1d(scores, kernel, stride=1, padding=kernel // 2)
        return torch.nn.functional.avg_pool1d(scores, kernel, stride=1, padding=kernel // 2)
