"""RMS norm of a latent whose slices lie on different ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rag_kernels.latent.weights import rank_slice


def exact_norm(latent_TD: Tensor, gamma: float, eps: float) -> Tensor:
    """Norm over the whole latent, which every rank computes: its projection is replicated.

    Parameters
    ----------
    latent_TD : Tensor
        ``[..., D]``, before the norm.
    gamma : float
        The folded norm's weight, equal in all entries.
    eps : float
        Added to the mean square.
    """
    wide = latent_TD.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale).to(latent_TD.dtype) * gamma


def sliced_norm(latent_TD: Tensor, gamma: float, eps: float, shares: Sequence[float]) -> Tensor:
    """The paper's norm: each rank estimates the whole latent's mean square from its own slice.

    Parameters
    ----------
    latent_TD, gamma, eps : Tensor, float, float
        As for :func:`exact_norm`.
    shares : sequence of float
        Of each rank's slice in the energy of the latent (:func:`energy_shares`).
    """
    dim, parts = latent_TD.shape[-1], []
    for rank, share in enumerate(shares):
        part = latent_TD[..., rank_slice(dim, rank, len(shares))].float()
        mean = part.square().sum(-1, keepdim=True) / (dim * share)
        parts.append((part * torch.rsqrt(mean + eps)).to(latent_TD.dtype) * gamma)
    return torch.cat(parts, -1)


def energy_shares(moment_DD: Tensor, basis_DD: Tensor, ranks: int) -> tuple[float, ...]:
    """Part of the latent's energy that lies in each rank's slice; they sum to one.

    Parameters
    ----------
    moment_DD : Tensor
        ``[D, D]``, mean of ``c c^T`` before the rotation.
    basis_DD : Tensor
        ``[D, D]``, the rotation.
    ranks : int
        Number of slices.
    """
    energy = ((moment_DD.double() @ basis_DD.double()) * basis_DD.double()).sum(0)
    dim = len(energy)
    parts = [energy[rank_slice(dim, rank, ranks)].sum() for rank in range(ranks)]
    return tuple(float(part / energy.sum()) for part in parts)


def literal_scales(shares: Sequence[float]) -> tuple[float, ...]:
    """Scales of logits by the letter of the paper: the inverse of each slice's share. They amplify noise; see docs."""
    return tuple(1.0 / max(share, 1e-9) for share in shares)
