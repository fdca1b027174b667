"""What lies on which rank of a latent that is sliced over ranks, and how a whole one comes together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rag_kernels.latent import rank_slice

__all__ = ["LatentSlices"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentSlices:
    """Slices of one layer's latents.

    Parameters
    ----------
    group : GroupCoordinator
        The ranks of attention, in the order of the slices.
    dim : int
        Width ``D`` of the whole latent.
    """

    group: Any
    dim: int

    @property
    def own(self) -> slice:
        """Numbers of the latent that this rank keeps."""
        return rank_slice(self.dim, self.group.rank_in_group, self.group.world_size)

    @property
    def width(self) -> int:
        """How many these are."""
        own = self.own
        return int(own.stop - own.start)

    def part(self, latents: Tensor) -> Tensor:
        """Return this rank's slice of whole latents ``[..., D]``."""
        return latents[..., self.own]

    def whole(self, rows: Tensor) -> Tensor:
        """Whole rows ``[P, 1, D + R]`` of this rank's ``[P, 1, width + R]``; all ranks ask for the same tokens at once."""
        if not len(rows):
            return rows.new_empty(0, 1, self.dim + rows.shape[-1] - self.width)
        latent = self.group.all_gather(rows[..., : self.width].contiguous(), dim=-1)
        return torch.cat([latent, rows[..., self.width :]], -1)
