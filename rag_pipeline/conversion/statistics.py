"""Second moments of a layer's queries, keys and values on real text, and how far its attention reaches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rag_pipeline.conversion.layers import Attended
from rag_pipeline.conversion.source import SourceShape


@dataclass(kw_only=True, slots=True)
class LayerStatistics:
    """Sums over calibration tokens, fp64; filled by :meth:`add`.

    Parameters
    ----------
    kv : Tensor
        ``(2 K E, 2 K E)``: products of keys (before RoPE) and values of a token.
    q_HEE : Tensor
        Products of each head's query, before RoPE.
    reach : Tensor
        ``(window,)``: attention by distance in tokens, without what goes to a window's first token.
    tokens : int
        Tokens seen.
    """

    kv: Tensor
    q_HEE: Tensor
    reach: Tensor
    tokens: int = 0

    @classmethod
    def empty(cls, shape: SourceShape, window: int) -> LayerStatistics:
        """Nothing seen yet."""
        width, head = 2 * shape.kv_width, shape.head_dim
        return cls(
            kv=torch.zeros(width, width, dtype=torch.float64),
            q_HEE=torch.zeros(shape.heads, head, head, dtype=torch.float64),
            reach=torch.zeros(window, dtype=torch.float64),
        )

    def add(self, seen: Attended) -> None:
        """Count a window."""
        kv = torch.cat([seen.k_TKE.flatten(1), seen.v_TKE.flatten(1)], 1)
        self.kv += (kv.T @ kv).double()
        q = seen.q_THE.transpose(0, 1)
        self.q_HEE += (q.transpose(1, 2) @ q).double()
        weights = seen.weights_HTT.sum(0).double()
        # What models give to the first token for want of a better place says nothing about distances.
        weights[:, 0] = 0
        place = torch.arange(len(weights))
        self.reach.index_add_(0, (place[:, None] - place).clamp(min=0).flatten(), weights.flatten())
        self.tokens += len(kv)

    def mean_rotation(self, frequencies: Tensor) -> Tensor:
        """Mean turn of RoPE over the distances that attention reaches, complex ``(F,)``; 1 keeps all, 0 nothing."""
        total = self.reach.sum()
        if total <= 0:
            return torch.ones(len(frequencies), dtype=torch.complex128)
        distances = torch.arange(len(self.reach), dtype=torch.float64)
        angles = torch.outer(distances, frequencies)
        turns = torch.polar(torch.ones_like(angles), -angles)
        return ((self.reach / total)[:, None] * turns).sum(0)
