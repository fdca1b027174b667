"""Symmetric 4-bit integers with one scale per token, or per group of tokens as an MMA thread holds them.

Per token is at least as accurate. The groups are those of the paper's kernel on Ada GPUs, kept to compare with it:
of 16 query rows, ``r`` and ``r + 8`` share a scale; of 32 keys, those with the same ``(index mod 8) // 2`` do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

Granularity = Literal["token", "thread_group"]
Role = Literal["queries", "keys"]

INT4_MAX = 7
"""Largest value; the range is symmetric, -7 .. 7."""

_QUERY_TILE, _KEY_TILE = 16, 32


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Int4:
    """Quantised vectors.

    Attributes
    ----------
    values : Tensor
        int8 ``[..., T, D]``, -7 .. 7.
    scale : Tensor
        fp32 ``[..., T]``; a vector is about ``values * scale``, each element to within half a scale.
    """

    values: Tensor
    scale: Tensor

    def dequantize(self) -> Tensor:
        """fp32 ``[..., T, D]``."""
        return self.values * self.scale[..., None]


def quantize_int4(x: Tensor, role: Role, granularity: Granularity = "token") -> Int4:
    """Round to the nearest of 15 values between -absmax and absmax of the token or its group.

    Parameters
    ----------
    x : Tensor
        fp32 ``[..., T, D]``. Groups are counted from the first token.
    role : {'queries', 'keys'}
        Decides what a thread group is.
    granularity : {'token', 'thread_group'}
        Who shares a scale.
    """
    scale = x.abs().amax(dim=-1) / INT4_MAX
    if granularity == "thread_group":
        scale = _share_query_scales(scale) if role == "queries" else _share_key_scales(scale)
    divisor = scale.clamp_min(torch.finfo(scale.dtype).tiny)[..., None]
    values = (x / divisor).round_().clamp_(-INT4_MAX, INT4_MAX).to(torch.int8)
    return Int4(values=values, scale=scale)


def _share_query_scales(scale: Tensor) -> Tensor:
    count = scale.shape[-1]
    tiles = pad(scale, (0, -count % _QUERY_TILE)).unflatten(-1, (-1, 2, 8))
    return tiles.amax(dim=-2, keepdim=True).expand_as(tiles).flatten(-3)[..., :count]


def _share_key_scales(scale: Tensor) -> Tensor:
    count = scale.shape[-1]
    tiles = pad(scale, (0, -count % _KEY_TILE)).unflatten(-1, (-1, 4, 4, 2))
    return tiles.amax(dim=(-3, -1), keepdim=True).expand_as(tiles).flatten(-4)[..., :count]
