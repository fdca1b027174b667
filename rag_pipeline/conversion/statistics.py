"""Second moments of a layer's queries, keys and values on real text, and how far its attention reaches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

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
    reach_HW : Tensor
        ``(heads, window)``: attention by distance in tokens, without what goes to a window's first token.
    tokens : int
        Tokens seen.
    """

    kv: Tensor
    q_HEE: Tensor
    reach_HW: Tensor
    tokens: int = 0

    @classmethod
    def empty(cls, shape: SourceShape, window: int) -> LayerStatistics:
        """Nothing seen yet."""
        width, head = 2 * shape.kv_width, shape.head_dim
        return cls(
            kv=torch.zeros(width, width, dtype=torch.float64),
            q_HEE=torch.zeros(shape.heads, head, head, dtype=torch.float64),
            reach_HW=torch.zeros(shape.heads, window, dtype=torch.float64),
        )

    def add(self, seen: Attended, *, reach: bool = True) -> None:
        """Count a window; its attention by distance, which takes longest, only if `reach`."""
        kv = torch.cat([seen.k_TKE.flatten(1), seen.v_TKE.flatten(1)], 1)
        self.kv += (kv.T @ kv).double()
        q = seen.q_THE.transpose(0, 1)
        self.q_HEE += (q.transpose(1, 2) @ q).double()
        self.tokens += len(kv)
        if reach:
            weights = seen.weights()
            # What models give to the first token for want of a better place says nothing about distances.
            weights[..., 0] = 0
            self.reach_HW += by_distance(weights)

    def mean_rotations(self, frequencies: Tensor) -> Tensor:
        """Mean turn of RoPE over the distances that each head's attention reaches.

        Returns
        -------
        Tensor
            Complex ``(H, F)``: of absolute value 1 where all distances turn alike, near 0 where position decides.
        """
        share = self.reach_HW / self.reach_HW.sum(1, keepdim=True).clamp(min=1e-300)
        share[self.reach_HW.sum(1) <= 0, 0] = 1.0
        distances = torch.arange(share.shape[1], dtype=torch.float64)
        angles = torch.outer(distances, frequencies)
        return share.to(torch.complex128) @ torch.polar(torch.ones_like(angles), -angles)


def by_distance(weights_HTT: Tensor) -> Tensor:
    """Sums over the diagonals of lower triangular matrices, fp64 ``(H, T)``: the main one first."""
    length = weights_HTT.shape[-1]
    # Rows turned round, with a row's length of zeros behind each; read as rows that are one shorter, entries of
    # one diagonal stand below each other.
    padded = functional.pad(weights_HTT.flip(-1), (0, length)).flatten(1)
    skewed = padded[:, : length * (2 * length - 1)].view(-1, length, 2 * length - 1)
    return skewed.sum(1)[:, length - 1 :].double()
