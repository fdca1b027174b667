"""Orthogonal bases of a latent: which of its directions go to which rank."""

from __future__ import annotations

import torch
from torch import Tensor

from rag_kernels.latent.statistics import LatentStatistics

BASES = ("identity", "hadamard", "pca", "output")
"""Names of the bases; the last two need statistics of the model."""


def create_basis(
    name: str, dim: int, statistics: LatentStatistics | None = None, *, seed: int = 0
) -> Tensor:
    """Make the basis of one layer.

    Parameters
    ----------
    name : str
        ``identity``: as the checkpoint has it. ``hadamard``: energy spread evenly (rows of random signs). ``pca``: the
        first rank gets the directions of most energy. ``output``: the same of the latent as logits and outputs weigh it.
    dim : int
        Width of the latent.
    statistics : LatentStatistics, optional
        Of this layer, in the coordinates of its folded weights; for ``pca`` and ``output``.
    seed : int
        Of the random parts of ``hadamard``.

    Returns
    -------
    Tensor
        fp32 ``[D, D]``, orthogonal; columns in the order of the slices.

    Raises
    ------
    ValueError
        No such basis, or it needs statistics of this width.
    """
    if name == "identity":
        return torch.eye(dim)
    if name == "hadamard":
        return _hadamard(dim, torch.Generator().manual_seed(seed))
    if name not in BASES:
        raise ValueError(f"basis {name!r} is not known; choose one of {', '.join(BASES)}.")
    if statistics is None:
        raise ValueError(f"basis {name!r} needs statistics of the model.")
    if statistics.dim != dim:
        raise ValueError(f"statistics of width {statistics.dim} do not fit a latent of {dim}.")
    return _principal(statistics.latent_DD) if name == "pca" else _output_weighted(statistics)


def _hadamard(dim: int, generator: torch.Generator) -> Tensor:
    """Sylvester's matrix for the power of two in `dim`, a random rotation for the odd rest; signs and order are random."""
    odd = dim
    while odd % 2 == 0:
        odd //= 2
    grown = torch.ones(1, 1)
    while len(grown) < dim // odd:
        grown = torch.cat([torch.cat([grown, grown], 1), torch.cat([grown, -grown], 1)])
    grown = grown / len(grown) ** 0.5
    rest = torch.linalg.qr(torch.randn(odd, odd, generator=generator))[0]
    signs = torch.randint(0, 2, (dim, 1), generator=generator) * 2 - 1
    mixed: Tensor = torch.kron(grown, rest.contiguous()) * signs
    return mixed[torch.randperm(dim, generator=generator)]


def _principal(moment_DD: Tensor) -> Tensor:
    return torch.linalg.eigh(moment_DD.double())[1].flip(1).float()


def _output_weighted(statistics: LatentStatistics) -> Tensor:
    """Directions such that the first ones carry the weighted energy ``|W^(1/2) c|^2``, for every number of them.

    They are the principal directions of ``W^(1/2) c``, taken back and made orthogonal one after another: the first
    ``k`` columns span what the best ``k`` coordinates of that vector depend on.
    """
    values, vectors = torch.linalg.eigh(statistics.weight_DD.double())
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.mT
    weighted = root @ statistics.latent_DD.double() @ root
    directions = root @ torch.linalg.eigh(weighted)[1].flip(1)
    return torch.linalg.qr(directions)[0].float()
