"""KIVI: keys rounded per channel, values per token, in small groups with a range each."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from chunk_cache.codecs.base import Codec, CodecError, check_layer, stored
from chunk_cache.codecs.ranges import group_ranges, levels_to_values, round_to_levels
from chunk_cache.layouts.base import LayerKV

GROUP = 32
"""Values that share a range: tokens of one key channel, or channels of one value vector."""


class KiviCodec(Codec):
    """Integers between the smallest and the largest value of each group.

    Keys have channels that are large in every token, so a group is :data:`GROUP` consecutive tokens of one channel.
    Values have no such channels, so a group is :data:`GROUP` consecutive channels of one token; the last group of a
    head is smaller where its size is no multiple. Tokens behind the last full group of keys stay as they are.

    Stored are, with ``F = T // GROUP * GROUP`` tokens in full groups:

    ========= =============================================================
    k_codes   uint8 ``[packed F, H, D]``
    k_ranges  ``[2, F / GROUP, H, D]``, smallest and largest of each group
    k_tail    ``[T - F, H, D]``, keys as they are
    v_codes   uint8 ``[packed T, H, D_v]``
    v_ranges  ``[2, T, H, ceil(D_v / GROUP)]``
    ========= =============================================================

    An error is at most half a step, ``(largest - smallest) / levels / 2``, plus the rounding to the record's dtype.

    KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache (https://arxiv.org/abs/2402.02750). Deviations:

    - The keys are those of the engine's pool: they carry the rotation of ``base_position``, as in the authors' code.
      But they are rotated once more when they are loaded at another place. That turns the error of two channels into
      each other, and leaves its length as it is.
    - Ranges are stored as smallest and largest value instead of scale and zero point, in the record's dtype. Both are
      values of the record, so they do not round, and encoding again finds the same.
    - A record is complete when it is written. So there is no window of the newest tokens that stays as it is: only
      the keys of a last, incomplete group do, and no values.
    - KV is decoded before it is attended to, and 8 and 4 bits take the place of 2.
    """

    bits: ClassVar[int]
    """Of one stored integer."""

    @abc.abstractmethod
    def pack(self, codes: Tensor) -> Tensor:
        """Pack uint8 ``[T, ...]``, each below ``2 ** bits``, along the tokens."""

    @abc.abstractmethod
    def unpack(self, packed: Tensor, num_tokens: int) -> Tensor:
        """Return what :meth:`pack` was given; T is `num_tokens`."""

    @abc.abstractmethod
    def packed_tokens(self, num_tokens: int) -> int:
        """First size of what :meth:`pack` returns."""

    def encode(self, layer: LayerKV) -> dict[str, Tensor]:
        """Round keys per channel, values per token."""
        check_layer(layer)
        k, v = layer
        steps = 2**self.bits - 1
        full = k.shape[0] // GROUP * GROUP
        k_GNHD = (
            k[:full].unflatten(0, (-1, GROUP)) if full else k.new_empty((0, GROUP, *k.shape[1:]))
        )
        k_ranges = group_ranges(k_GNHD, -3)
        k_codes = round_to_levels(k_GNHD, k_ranges[:, :, None], steps).flatten(0, 1)
        v_ranges = torch.stack([group_ranges(part, -1) for part in v.split(GROUP, dim=-1)], dim=-1)
        v_codes = round_to_levels(v, _per_channel(v_ranges, v.shape[-1]), steps)
        return {
            "k_codes": self.pack(k_codes),
            "k_ranges": k_ranges,
            "k_tail": k[full:].contiguous(),
            "v_codes": self.pack(v_codes),
            "v_ranges": v_ranges,
        }

    def decode(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> LayerKV:
        """Turn levels into values, and append the tail."""
        k_codes, k_ranges, k_tail, v_codes, v_ranges = stored(
            tensors, "k_codes", "k_ranges", "k_tail", "v_codes", "v_ranges"
        )
        steps = 2**self.bits - 1
        self._check(k_codes, k_ranges, k_tail, v_codes, v_ranges, dtype)
        full = k_ranges.shape[1] * GROUP
        codes_GNHD = self.unpack(k_codes, full).view(-1, GROUP, *k_tail.shape[1:])
        k_full = levels_to_values(codes_GNHD, k_ranges[:, :, None], steps).flatten(0, 1)
        v_levels = self.unpack(v_codes, v_ranges.shape[1])
        v = levels_to_values(v_levels, _per_channel(v_ranges, v_codes.shape[-1]), steps)
        return LayerKV(torch.cat((k_full, k_tail)), v)

    def _check(
        self,
        k_codes: Tensor,
        k_ranges: Tensor,
        k_tail: Tensor,
        v_codes: Tensor,
        v_ranges: Tensor,
        dtype: torch.dtype,
    ) -> None:
        groups, num_tokens = k_ranges.shape[1], v_ranges.shape[1]
        wanted: dict[str, tuple[Tensor, tuple[int, ...], torch.dtype]] = {
            "k_codes": (
                k_codes,
                (self.packed_tokens(groups * GROUP), *k_tail.shape[1:]),
                torch.uint8,
            ),
            "k_ranges": (k_ranges, (2, groups, *k_tail.shape[1:]), dtype),
            "k_tail": (k_tail, (num_tokens - groups * GROUP, *k_tail.shape[1:]), dtype),
            "v_codes": (
                v_codes,
                (self.packed_tokens(num_tokens), *v_codes.shape[1:]),
                torch.uint8,
            ),
            "v_ranges": (
                v_ranges,
                (2, num_tokens, *v_codes.shape[1:-1], -(-v_codes.shape[-1] // GROUP)),
                dtype,
            ),
        }
        for name, (tensor, shape, of) in wanted.items():
            if tuple(tensor.shape) != shape or tensor.dtype != of:
                raise CodecError(
                    f"stored {name} is {list(tensor.shape)} {tensor.dtype}: expected {list(shape)} {of}"
                )


def _per_channel(ranges: Tensor, size: int) -> Tensor:
    """Ranges ``[..., groups]`` of groups of channels, once for each of `size` channels."""
    return ranges.repeat_interleave(GROUP, dim=-1)[..., :size]
