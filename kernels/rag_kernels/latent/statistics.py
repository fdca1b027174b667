"""What a basis is calibrated from: energy of a layer's latent, and how much logits and outputs depend on it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rag_kernels.latent.weights import LatentWeights


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentStatistics:
    """Statistics of one layer, in the coordinates of its folded weights.

    Attributes
    ----------
    latent_DD : Tensor
        ``[D, D]``, mean of ``c c^T`` over tokens, not centred; ``c`` is the latent behind its norm.
    weight_DD : Tensor
        ``[D, D]``: an error ``e`` of the latent costs ``e^T W e``, summed over heads, in logits of the queries that were
        seen and in the layer's output; both parts count alike over the latents that were seen.
    """

    latent_DD: Tensor
    weight_DD: Tensor

    def __post_init__(self) -> None:
        shapes = (tuple(self.latent_DD.shape), tuple(self.weight_DD.shape))
        if shapes[0] != shapes[1] or len(shapes[0]) != 2 or shapes[0][0] != shapes[0][1]:
            raise ValueError(f"statistics of shapes {shapes[0]} and {shapes[1]} are not square.")

    @property
    def dim(self) -> int:
        """Width of the latent."""
        return int(self.latent_DD.shape[0])


class StatisticsSum:
    """Sums of one layer over tokens, until :meth:`result`.

    Parameters
    ----------
    weights : LatentWeights
        The layer's, folded.
    out_HVX : Tensor
        ``[H, V, X]``, each head's part of the output projection.
    """

    def __init__(self, weights: LatentWeights, out_HVX: Tensor) -> None:
        heads, nope, dim = weights.w_kc_HND.shape
        self._weights = weights
        self._out = out_HVX.float()
        self._latent = torch.zeros(dim, dim, dtype=torch.float64)
        self._query = torch.zeros(heads, nope, nope, dtype=torch.float64)
        self.tokens = 0

    def add(self, q_nope_THN: Tensor, latent_TD: Tensor) -> None:
        """Count tokens: their queries without position, and their latents behind the norm."""
        latent, query = latent_TD.float(), q_nope_THN.float().transpose(0, 1)
        self._latent += latent.mT @ latent
        self._query += query.mT @ query
        self.tokens += len(latent)

    def result(self) -> LatentStatistics:
        """Means over the tokens that were counted.

        Raises
        ------
        ValueError
            There was no token.
        """
        if not self.tokens:
            raise ValueError("no token was counted.")
        w_kc, w_vc = self._weights.w_kc_HND.double(), self._weights.w_vc_HDV.double()
        out = self._out.double()
        latent = self._latent / self.tokens
        logits = (w_kc.mT @ (self._query / self.tokens) @ w_kc).sum(0)
        outputs = (w_vc @ (out @ out.mT) @ w_vc.mT).sum(0)
        weight = sum(part / (part * latent).sum().clamp_min(1e-300) for part in (logits, outputs))
        assert isinstance(weight, Tensor)
        return LatentStatistics(latent_DD=latent.float(), weight_DD=weight.float())
