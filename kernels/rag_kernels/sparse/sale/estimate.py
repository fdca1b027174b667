"""Estimated logits of a block of rows against all keys before it, reduced while they are integers.

A logit is ``q . k = q' . k' + mean_q . k' + q . mean_k``: the last term is the same for all keys of a row and cancels
against its threshold. The first one is estimated from 4-bit integers, the second is one number per key, in fp32.

What a CPU is fast at is one product of int8 matrices and one maximum over its rows. So the 4-bit values of a block of
rows are put on one scale, those of all keys on another, in 7 bits: that rounds by a small part of what 4 bits round
by. Each row has a threshold of its own; what it is above the smallest of its block is subtracted inside of the same
product, in lanes behind the channels. The result is exact in these integers: no element is looked at twice.

Shape suffixes: N key/value heads, M groups of rows that are reduced together, W rows of a group, K keys, D head
dimension, L = D + 4 lanes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rag_kernels.sparse.sale.quantization import INT4_MAX, Granularity, quantize_int4
from rag_kernels.sparse.sale.smoothing import smooth_keys, smooth_queries

_LARGEST = 127
_SQRT_HALF = 0.70710678
_LANES = 4
"""Of a threshold: three that count 127 and one that counts 1. Also what int8 instructions take at a time."""
_TILE_KEYS = 2048
"""Keys of one product: its result stays in the second-level cache."""


class KeyTable:
    """Keys of a request in one layer, ready to be estimated.

    Parameters
    ----------
    k_NKD : Tensor
        fp32 ``[N, K, D]`` by position.
    num_sink : int
        First keys, which are always read and whose size says nothing of the others.
    num_frozen : int
        First keys that the mean is taken from; all pieces of a prompt have them.
    granularity : {'token', 'thread_group'}
        Who shares a 4-bit scale.
    is_estimated : bool
        False for exact logits.

    Attributes
    ----------
    smooth : Tensor
        fp32 ``[N, K, D]``: keys without their mean.
    mean : Tensor
        fp32 ``[N, 1, D]``.
    """

    def __init__(
        self,
        k_NKD: Tensor,
        *,
        num_sink: int,
        num_frozen: int,
        granularity: Granularity = "token",
        is_estimated: bool = True,
    ) -> None:
        self.smooth, self.mean = smooth_keys(k_NKD, num_frozen)
        self.is_estimated = is_estimated
        if not is_estimated:
            return
        int4 = quantize_int4(self.smooth, "keys", granularity)
        self._values = int4.dequantize()
        sizes = int4.scale * INT4_MAX
        sizes[:, :num_sink] = 0
        self._largest = sizes.cummax(dim=1).values
        self._unit = self.mean.new_zeros(len(self.mean))
        lanes = (*self.smooth.shape[:2], self.smooth.shape[2] + _LANES)
        self._lanes = torch.empty(lanes, dtype=torch.int8, device=k_NKD.device)
        self._lanes[..., -_LANES:-1] = _LARGEST
        self._lanes[..., -1] = 1

    def lanes(self, num_keys: int) -> tuple[Tensor, Tensor]:
        """Put the first keys on one scale per head.

        The scale is that of the largest of these keys, rounded up to half a power of two: other keys have no part in
        it, so a longer prompt estimates its first rows alike, and it seldom changes.

        Returns
        -------
        tuple of Tensor
            int8 ``[N, num_keys, L]``, the last lanes those of a threshold, and what 1 stands for, fp32 ``[N]``.
        """
        largest = self._largest[:, num_keys - 1]
        part, exponent = torch.frexp(largest)
        step = torch.where(part <= _SQRT_HALF, _SQRT_HALF, 1.0).masked_fill_(part <= 0.5, 0.5)
        unit = torch.ldexp(step, exponent) / _LARGEST
        unit = torch.where(largest > 0, unit, torch.ones_like(unit))
        # To look whether it changed would make the host wait for a GPU, which rescales the keys sooner than that.
        if unit.device.type != "cpu" or not torch.equal(unit, self._unit):
            values = (self._values / unit[:, None, None]).round_()
            self._lanes[..., :-_LANES] = values.clamp_(-_LARGEST, _LARGEST)
            self._unit = unit
        return self._lanes[:, :num_keys], unit


def largest_excess(
    q_NMWD: Tensor,
    threshold_NMW: Tensor,
    table: KeyTable,
    num_keys: int,
    granularity: Granularity = "token",
    counts: Tensor | None = None,
) -> Tensor:
    """By how much a key's logit is above the threshold of a row, for the row where it is most so.

    Parameters
    ----------
    q_NMWD : Tensor
        fp32 ``[N, M, W, D]`` queries.
    threshold_NMW : Tensor
        fp32 ``[N, M, W]``, finite, in units of ``q . k`` before the softmax scale.
    table : KeyTable
        Of the same layer.
    num_keys : int
        First keys to look at.
    granularity : {'token', 'thread_group'}
        Who shares a 4-bit scale.
    counts : Tensor, optional
        Integer ``[M]``: rows of each group, the others repeat its last; all by default.

    Returns
    -------
    Tensor
        fp32 ``[N, M, num_keys]``. A row whose threshold is very far above the smallest of its group counts with a
        lower one, so more is kept and never less.
    """
    smooth_q, mean_q = smooth_queries(q_NMWD, counts)
    keys = table.smooth[:, :num_keys]
    # Without the term that all keys of a row share.
    threshold = threshold_NMW - (q_NMWD * table.mean[:, None]).sum(dim=-1)
    smallest = threshold.amin(dim=-1, keepdim=True)
    by_mean = torch.bmm(mean_q[:, :, 0], keys.transpose(1, 2)).sub_(smallest)
    above = threshold - smallest
    if not table.is_estimated:
        logits = torch.matmul(smooth_q, keys[:, None].transpose(-1, -2)) - above[..., None]
        return logits.amax(dim=-2).add_(by_mean)
    key_lanes, key_unit = table.lanes(num_keys)
    query_lanes, unit = _query_lanes(smooth_q, above, key_unit, granularity)
    heads, groups, rows = threshold.shape
    most = torch.empty(
        (heads, groups, num_keys), dtype=_accumulator(q_NMWD.device), device=q_NMWD.device
    )
    for head in range(heads):
        left = query_lanes[head].flatten(0, 1)
        for start in range(0, num_keys, _TILE_KEYS):
            stop = min(start + _TILE_KEYS, num_keys)
            product = _integer_product(left, key_lanes[head, start:stop])
            torch.amax(product.view(groups, rows, -1), dim=1, out=most[head, :, start:stop])
    return by_mean.add_(most.float().mul_((unit * key_unit[:, None])[..., None]))


def _query_lanes(
    smooth_q: Tensor, above: Tensor, key_unit: Tensor, granularity: Granularity
) -> tuple[Tensor, Tensor]:
    """int8 ``[N, M, W, L]``: 4-bit queries on the scale of their group and minus the thresholds; the scale ``[N, M]``."""
    values = quantize_int4(smooth_q, "queries", granularity).dequantize()
    unit = values.abs().amax(dim=(2, 3)) / _LARGEST
    unit = torch.where(unit > 0, unit, torch.ones_like(unit))
    lanes = smooth_q.new_empty((*smooth_q.shape[:3], smooth_q.shape[3] + _LANES), dtype=torch.int8)
    lanes[..., :-_LANES] = values.div_(unit[..., None, None]).round_()
    limit = float((_LANES - 1) * _LARGEST * _LARGEST)
    count = (above / (unit * key_unit[:, None])[..., None]).round_().clamp_(max=limit)
    whole = torch.div(count, _LARGEST, rounding_mode="floor")
    lanes[..., -1] = -(count - whole * _LARGEST)
    for lane in range(smooth_q.shape[3], lanes.shape[3] - 1):
        part = whole.clamp(max=_LARGEST)
        lanes[..., lane] = -part
        whole = whole - part
    return lanes, unit


def _accumulator(device: torch.device) -> torch.dtype:
    return torch.int32 if device.type == "cpu" else torch.float32


def _integer_product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right.T`` of int8 matrices; in fp32, where these sums are exact, on devices other than a CPU."""
    if left.device.type == "cpu":
        return torch._int_mm(left, right.t())
    return left.float() @ right.float().t()
