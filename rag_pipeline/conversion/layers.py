"""Layers in plain torch: the parts that original and latent form share, the original's attention, the latent form's.

Shapes: B windows, T tokens, D hidden, H query heads, K key-value heads, E numbers per head, F = E / 2
frequencies, R numbers with a position, C numbers of the latent. Heads hold the real parts of all frequencies
before the imaginary ones.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional

from rag_pipeline.conversion.source import LayerWeights, SourceShape


def rms_norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Divide by the root of the mean square and `eps`, and scale."""
    return functional.rms_norm(x, (x.shape[-1],), scale, eps)


def network(layer: LayerWeights, x: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """What a layer's SwiGLU network adds to the residual stream `x`, both ``(..., D)`` fp32; computed in `dtype`."""
    h = rms_norm(x, layer.network_norm, eps).to(dtype)
    gate, up, down = (weight.to(dtype) for weight in (layer.gate, layer.up, layer.down))
    return ((functional.silu(h @ gate.T) * (h @ up.T)) @ down.T).float()


def rotations(length: int, frequencies: Tensor) -> Tensor:
    """Unit complex numbers ``(length, F)``, complex64, by which RoPE turns."""
    angles = torch.outer(torch.arange(length, dtype=torch.float64), frequencies)
    return torch.polar(torch.ones_like(angles), angles).to(torch.complex64)


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Turn one head or several side by side, ``(..., T, n * E)``, by position; `turn` is of :func:`rotations`."""
    heads = x.unflatten(-1, (-1, 2, turn.shape[-1]))
    real, imaginary = heads.unbind(-2)
    cos, sin = turn.real[:, None], turn.imag[:, None]
    turned = torch.stack([real * cos - imaginary * sin, imaginary * cos + real * sin], -2)
    return turned.flatten(-3)


def causal_attention(q_HTE: Tensor, k_HTE: Tensor, v_HTE: Tensor) -> Tensor:
    """Attention over one window, ``(T, H * E)``; logits are divided by the root of the queries' size."""
    size = v_HTE.shape[-1]
    # The fast kernel wants values as wide as keys.
    v_HTE = functional.pad(v_HTE, (0, q_HTE.shape[-1] - size))
    out = functional.scaled_dot_product_attention(
        q_HTE[None], k_HTE[None], v_HTE[None], is_causal=True
    )
    return out[0, ..., :size].transpose(0, 1).flatten(1)


@dataclass(frozen=True, slots=True)
class Attended:
    """The original's attention over one window.

    Parameters
    ----------
    q_THE, k_TKE, v_TKE : Tensor
        Before RoPE.
    turned_q_HTE, turned_k_HTE : Tensor
        Behind RoPE; keys of each query head.
    heads_out : Tensor
        ``(T, H * E)``, before the output projection.
    """

    q_THE: Tensor
    k_TKE: Tensor
    v_TKE: Tensor
    turned_q_HTE: Tensor
    turned_k_HTE: Tensor
    heads_out: Tensor

    def weights(self) -> Tensor:
        """Attention probabilities, ``(H, T, T)``."""
        length, head = self.turned_q_HTE.shape[-2:]
        later = torch.full((length, length), float("-inf")).triu(1)
        logits = self.turned_q_HTE * head**-0.5 @ self.turned_k_HTE.transpose(-1, -2)
        return (logits + later).softmax(-1)


def attend(layer: LayerWeights, h_TD: Tensor, shape: SourceShape, turn: Tensor) -> Attended:
    """Compute grouped-query attention of normed inputs."""
    length, group = len(h_TD), shape.heads // shape.kv_heads
    q, k, v = (
        (h_TD @ weight.T).view(length, -1, shape.head_dim) for weight in (layer.q, layer.k, layer.v)
    )
    turned_q, turned_k = (rotate(x.transpose(0, 1), turn) for x in (q, k))
    turned_k = turned_k.repeat_interleave(group, 0)
    out = causal_attention(turned_q, turned_k, v.transpose(0, 1).repeat_interleave(group, 0))
    return Attended(q, k, v, turned_q, turned_k, out)


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentLayer:
    """Attention of one layer in latent form, fp32.

    Parameters
    ----------
    q_HED, q_rope_HRD : Tensor
        Queries for the keys without and with a position; scaled for a softmax over ``E + R`` numbers.
    latent_CD, k_rope_RD : Tensor
        What is stored per token: the latent, and the keys with a position.
    k_up_HEC, v_up_HEC : Tensor
        From the latent to keys without a position, and to values.
    o : Tensor
        Output projection ``(D, H * E)``.
    """

    q_HED: Tensor
    q_rope_HRD: Tensor
    latent_CD: Tensor
    k_rope_RD: Tensor
    k_up_HEC: Tensor
    v_up_HEC: Tensor
    o: Tensor

    def heads_out(self, h_TD: Tensor, turn: Tensor) -> Tensor:
        """Attention over one window, ``(T, H * E)``, before the output projection.

        Parameters
        ----------
        h_TD : Tensor
            Normed inputs.
        turn : Tensor
            Of :func:`rotations`; all of the R / E heads with a position turn alike.
        """
        latent = h_TD @ self.latent_CD.T
        k_rope = rotate(h_TD @ self.k_rope_RD.T, turn)
        q_rope = rotate(_each_head(h_TD, self.q_rope_HRD), turn)
        q = torch.cat([_each_head(h_TD, self.q_HED), q_rope], -1)
        k = _each_head(latent, self.k_up_HEC)
        k = torch.cat([k, k_rope.expand(len(k), -1, -1)], -1)
        return causal_attention(q, k, _each_head(latent, self.v_up_HEC))

    def tensors(self) -> dict[str, Tensor]:
        """All weights by name."""
        return {field.name: getattr(self, field.name).contiguous() for field in fields(self)}

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> Self:
        """Make one of what :meth:`tensors` gave."""
        return cls(**{field.name: tensors[field.name] for field in fields(cls)})


def _each_head(x_TN: Tensor, maps_HEN: Tensor) -> Tensor:
    """``(H, T, E)``: inputs through each head's map."""
    together = x_TN @ maps_HEN.flatten(0, 1).T
    return together.view(len(x_TN), len(maps_HEN), -1).transpose(0, 1)
