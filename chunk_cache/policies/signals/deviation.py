"""Deviation signal: how far K and V of reused tokens move when they are computed anew, at a few check layers.

Each check is a pass of its own from layer 0, over the fresh rows and the reused ones that are still candidates. It is
the signal of CacheBlend (arXiv 2405.16444), whose engine shrinks one running pass instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from chunk_cache.policies.layout import ReuseLayout
from chunk_cache.policies.signals.base import PassObserver, ProbedRequest, ProbePasses, Signal
from rag_kernels import kv_deviation, to_device, to_host

Metric = Literal["k", "v", "kv"]


@dataclass(frozen=True, slots=True)
class DeviationSignal(Signal):
    """Scores for :meth:`ScoredPolicy.choose`, once per check layer: fp32 ``[len(candidates)]`` squared difference.

    ``stage`` is the index of the check layer, ``candidates`` are what the stage before has left.
    """

    name = "deviation"

    check_layers: tuple[int, ...]
    """Layers whose new K and V are looked at, rising, at least one."""
    metric: Metric = "kv"
    """What deviates."""

    def cost(self, layout: ReuseLayout, kept: Sequence[int]) -> float:
        """Each check: whole layers before it and the QKV share of its own, for candidates and fresh rows."""
        before = (layout.num_reused, *kept[:-1])
        return sum(
            (layer + layout.qkv_share) * (rows + layout.scoring_rows)
            for layer, rows in zip(self.check_layers, before, strict=True)
        )

    def choose(self, passes: ProbePasses, requests: Sequence[ProbedRequest]) -> list[Tensor]:
        """One pass per check layer, each with fewer rows."""
        left = [request.candidates for request in requests]
        for stage, layer in enumerate(self.check_layers):
            scores = self._check(passes, requests, left, layer)
            chosen = [
                request.policy.choose(
                    request.layout, scores[i], to_device(left[i], scores[i].device), stage
                )
                for i, request in enumerate(requests)
            ]
            left = to_host([one.to(torch.int64) for one in chosen])
        return left

    def _check(
        self,
        passes: ProbePasses,
        requests: Sequence[ProbedRequest],
        left: Sequence[Tensor],
        layer: int,
    ) -> list[Tensor]:
        rows, wanted, first = [], [], 0
        for request, candidates in zip(requests, left, strict=True):
            positions = request.with_fresh(candidates)
            rows.append(request.rows(positions))
            wanted.append(torch.searchsorted(positions, candidates) + first)
            first += int(positions.numel())
        slots = torch.cat([part.row_slots for part in rows])
        observer = DeviationObserver(layer, wanted, slots, self.metric)
        passes.run(rows, observer)
        return [passes.total(deviation) for deviation in observer.deviation]


class DeviationObserver(PassObserver):
    """Takes the KV deviation of rows at one layer.

    Parameters
    ----------
    layer : int
        The check layer, the last one of the pass.
    rows : sequence of Tensor
        Per request int64: rows of the pass whose deviation is wanted.
    slots : Tensor
        int64 ``[R]``: slots of all rows of the pass.
    metric : {"k", "v", "kv"}
        What deviates.

    Attributes
    ----------
    deviation : list of Tensor
        Per request fp32, one number per row: of this rank's heads.
    """

    def __init__(self, layer: int, rows: Sequence[Tensor], slots: Tensor, metric: Metric) -> None:
        self._layer = layer
        self._rows = [to_device(r, slots.device) for r in rows]
        self._slots = slots
        self._metric = metric
        self.deviation: list[Tensor] = []

    @property
    def last_layer(self) -> int:
        """The check layer."""
        return self._layer

    def before_write(
        self, layer_id: int, k_pool: Tensor, v_pool: Tensor, k: Tensor, v: Tensor
    ) -> None:
        """Compare at the check layer, while the pool still holds what was loaded."""
        if layer_id != self._layer:
            return
        for rows in self._rows:
            slots = self._slots[rows]
            self.deviation.append(
                kv_deviation(
                    k[rows],
                    k_pool[slots].to(k.dtype),
                    v[rows],
                    v_pool[slots].to(v.dtype),
                    self._metric,
                )
            )
