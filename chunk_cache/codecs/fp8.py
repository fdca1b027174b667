"""Keys and values as 8-bit floats with one scale per head."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from chunk_cache.codecs.base import Codec, CodecError, check_layer, stored
from chunk_cache.layouts.base import LayerKV

_MOST = 448.0
"""Largest value of e4m3."""


class Fp8Codec(Codec):
    """Stores each value as e4m3 (4 bits of exponent, 3 of mantissa), one byte, relative to its head's largest one.

    Stored are, for keys and for values, ``codes`` (``float8_e4m3fn [T, H, D]``) and ``most`` (the record's dtype,
    ``[H]``): the largest absolute value of the head over all tokens. A value is ``codes / 448 * most``. The largest
    value itself is exact, so the codes never saturate in practice; they are clamped all the same, because e4m3 has no
    infinity, and what is too large becomes NaN.

    An error is at most 1/16 of the value or, near zero, ``most / 448 / 1024``; plus the rounding to the record's
    dtype. One scale per head and not per token, since e4m3 covers a range of 2^18 by itself.

    FP8 Formats for Deep Learning (https://arxiv.org/abs/2209.05433). Deviation: scales by head and record, not by
    tensor, and ``most`` is stored instead of the scale, because it does not round.
    """

    name = "fp8"

    def encode(self, layer: LayerKV) -> dict[str, Tensor]:
        """Round to e4m3; see :class:`Fp8Codec` for what is stored."""
        check_layer(layer)
        k_codes, k_most = _quantise(layer.k)
        v_codes, v_most = _quantise(layer.v)
        return {"k_codes": k_codes, "k_most": k_most, "v_codes": v_codes, "v_most": v_most}

    def decode(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> LayerKV:
        """Scale the codes back."""
        k_codes, k_most, v_codes, v_most = stored(tensors, "k_codes", "k_most", "v_codes", "v_most")
        return LayerKV(_dequantise(k_codes, k_most, dtype), _dequantise(v_codes, v_most, dtype))


def _quantise(x_THD: Tensor) -> tuple[Tensor, Tensor]:
    # Padded with a token of zeros: a maximum over no tokens is an error.
    most_H = torch.nn.functional.pad(x_THD.abs(), (0, 0, 0, 0, 0, 1)).amax(dim=(0, 2))
    # Where a head is all zeros, 0 / 1 is 0, too.
    scale_H1 = torch.where(most_H > 0, most_H, 1).float()[:, None]
    codes = (x_THD.float() / scale_H1 * _MOST).clamp_(-_MOST, _MOST)
    return codes.to(torch.float8_e4m3fn), most_H


def _dequantise(codes_THD: Tensor, most_H: Tensor, dtype: torch.dtype) -> Tensor:
    if codes_THD.ndim != 3 or most_H.shape != codes_THD.shape[1:2] or most_H.dtype != dtype:
        raise CodecError(
            f"stored codes {list(codes_THD.shape)} and scales {list(most_H.shape)} {most_H.dtype} "
            f"do not make a layer of {dtype}"
        )
    return (codes_THD.float() / _MOST * most_H.float()[:, None]).to(dtype)
