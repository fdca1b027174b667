"""4-bit keys of a chunk that do not know where it stands.

Rotated keys depend on the position, so 4-bit copies of them would have to be made anew for each place of a chunk.
Rotary positions are relative: ``(R(p) q) . (R(s + i) k) == (R(p - s) q) . (R(i) k)``. Keys that are rotated by their
index in the chunk alone therefore serve at every start ``s``, against queries that are rotated back by ``s``: one
rotation of the queries per chunk, and none of the keys.

Shape suffixes: R rows, T tokens of the chunk, H query heads, N key/value heads, D head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rag_kernels.rotary import RotarySpec, rotate
from rag_kernels.sparse.sale.quantization import pack_int4, quantize_int4, unpack_int4


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LocalKeys:
    """One layer of a chunk.

    Attributes
    ----------
    packed : Tensor
        uint8 ``[N, T, D / 2]``: keys without their mean.
    scale : Tensor
        fp32 ``[N, T]``.
    mean : Tensor
        fp32 ``[N, 1, D]``. It differs from chunk to chunk, so it does not cancel in the softmax of a prompt: logits
        hold it.
    """

    packed: Tensor
    scale: Tensor
    mean: Tensor

    @classmethod
    def from_keys(cls, k_TND: Tensor, start: int, spec: RotarySpec) -> LocalKeys:
        """Quantise keys that are rotated for positions ``start .. start + T - 1``."""
        local = rotate_by(k_TND.float(), -start, spec).transpose(0, 1)
        mean = local.mean(dim=1, keepdim=True)
        int4 = quantize_int4(local - mean, "keys")
        return cls(packed=pack_int4(int4.values), scale=int4.scale, mean=mean)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return int(self.packed.nbytes + self.scale.nbytes + self.mean.nbytes)

    def keys(self) -> Tensor:
        """fp32 ``[N, T, D]``: what the 4 bits say, rotated by the index in the chunk."""
        return unpack_int4(self.packed) * self.scale[..., None] + self.mean

    def logits(self, q_RHD: Tensor, start: int, spec: RotarySpec) -> Tensor:
        """Estimate ``q . k`` of a chunk that stands at ``start``.

        Parameters
        ----------
        q_RHD : Tensor
            Queries, rotated for their own positions.
        start : int
            Position of the chunk's first token, wherever it was when it was quantised.
        spec : RotarySpec
            Of the model.

        Returns
        -------
        Tensor
            fp32 ``[H, R, T]``.
        """
        rotated = rotate_by(q_RHD.float(), -start, spec).transpose(0, 1)
        keys = self.keys()
        return rotated @ keys.repeat_interleave(len(rotated) // len(keys), dim=0).transpose(1, 2)


def rotate_by(x: Tensor, delta: int, spec: RotarySpec) -> Tensor:
    """Move fp32 vectors ``[..., D]`` by a number of positions."""
    cos, sin = spec.cos_sin(torch.tensor([delta]), x.device)
    return rotate(x, cos, sin, spec)
