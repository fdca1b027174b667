"""Weights of one MLA layer that touch its latent, and their change of basis after loading."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentWeights:
    """What produces and reads the latent of one layer.

    Attributes
    ----------
    down_DX : Tensor
        ``[D, X]``, the latent's rows of ``kv_a_proj_with_mqa``; without those of the position part.
    gamma_D : Tensor
        ``[D]``, weight of ``kv_a_layernorm``.
    w_kc_HND : Tensor
        ``[H, N, D]``, absorbed into queries.
    w_vc_HDV : Tensor
        ``[H, D, V]``, absorbed into outputs.
    """

    down_DX: Tensor
    gamma_D: Tensor
    w_kc_HND: Tensor
    w_vc_HDV: Tensor

    def __post_init__(self) -> None:
        dim = self.dim
        widths = (self.gamma_D.shape[0], self.w_kc_HND.shape[2], self.w_vc_HDV.shape[1])
        if any(width != dim for width in widths):
            raise ValueError(
                f"the latent is {dim} wide in kv_a_proj, but {widths[0]} in its norm, {widths[1]} in w_kc and "
                f"{widths[2]} in w_vc."
            )

    @property
    def dim(self) -> int:
        """Width of the latent."""
        return int(self.down_DX.shape[0])

    def folded(self) -> LatentWeights:
        """Move the norm's weight into ``w_kc`` and ``w_vc``, and leave it equal in all entries.

        What is left is the root mean square of the weight, not one: stored latents keep their size, which matters
        where the checkpoint scales latents far from one and the pool holds few bits.

        Returns
        -------
        LatentWeights
            In fp32; the same attention up to rounding.
        """
        gamma = self.gamma_D.float()
        # As the model's type holds it: half precision would scale all latents by what it rounds off.
        common = gamma.square().mean().sqrt().to(self.gamma_D.dtype).float()
        if common == 0:
            raise ValueError("the norm's weight is zero in all entries.")
        share = gamma / common
        return LatentWeights(
            down_DX=self.down_DX.float(),
            gamma_D=common.expand(self.dim).clone(),
            w_kc_HND=self.w_kc_HND.float() * share,
            w_vc_HDV=self.w_vc_HDV.float() * share[:, None],
        )

    def rotated(self, basis_DD: Tensor) -> LatentWeights:
        """Express the latent in an orthogonal basis; needs :meth:`folded` weights.

        Parameters
        ----------
        basis_DD : Tensor
            ``[D, D]``, fp32; its columns are the new coordinates' directions, in the order of the slices.

        Returns
        -------
        LatentWeights
            In fp32; the norm is the same, because rotations keep lengths.

        Raises
        ------
        ValueError
            The norm's weight differs between entries, or the basis is not orthogonal.
        """
        if not torch.equal(self.gamma_D, self.gamma_D[:1].expand_as(self.gamma_D)):
            raise ValueError("the norm's weight has to be folded before the latent is rotated.")
        basis = basis_DD.to(self.down_DX)
        off = (basis.mT @ basis - torch.eye(self.dim).to(basis)).abs().max()
        if off > 1e-4:
            raise ValueError(f"the basis is not orthogonal (off by {float(off):.1e}).")
        return replace(
            self,
            down_DX=basis.mT @ self.down_DX,
            w_kc_HND=self.w_kc_HND @ basis,
            w_vc_HDV=basis.mT @ self.w_vc_HDV,
        )


def rank_slice(dim: int, rank: int, ranks: int) -> slice:
    """Coordinates of the latent that a rank holds: equal runs in the order of the ranks.

    Raises
    ------
    ValueError
        The latent cannot be cut into so many equal parts.
    """
    if ranks < 1 or dim % ranks:
        raise ValueError(f"a latent of width {dim} cannot be cut into {ranks} equal slices.")
    width = dim // ranks
    return slice(rank * width, (rank + 1) * width)
