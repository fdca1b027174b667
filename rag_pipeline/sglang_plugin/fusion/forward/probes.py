"""Observers of probing passes: the question's attention mass, and the deviation of recomputed KV."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from rag_kernels import kv_deviation, query_attention_mass
from rag_pipeline.sglang_plugin.fusion.forward.layer_pass import StopPassError

Reduce = Callable[[Tensor], Tensor]
"""Combines a tensor over the attention tensor-parallel ranks; the identity where there is one."""


class MassObserver:
    """Sums up the attention mass of chosen rows over a range of layers, then stops the pass.

    Parameters
    ----------
    layers : range
        Layers to look at; the pass ends inside the last one, before its attention.
    rows : sequence of (int, int)
        Per request: rows of the pass whose mass is wanted.
    positions : sequence of Tensor
        Per request int64: absolute positions of those rows.
    slots : sequence of Tensor
        Per request int64 ``[kv_len]``.
    stops : bool
        False lets the pass go on to its logits.
    """

    def __init__(
        self,
        layers: range,
        rows: Sequence[tuple[int, int]],
        positions: Sequence[Tensor],
        slots: Sequence[Tensor],
        scaling: float,
        *,
        stops: bool = True,
    ) -> None:
        self._layers = layers
        self._stops = stops
        self._rows = list(rows)
        self._positions = list(positions)
        self._slots = list(slots)
        self._scaling = scaling
        self.mass: list[Tensor] = [
            torch.zeros(s.numel(), dtype=torch.float32, device=s.device) for s in slots
        ]

    @property
    def last_layer(self) -> int:
        """Last layer of the range; beyond every model's where the pass goes on."""
        return self._layers.stop - 1 if self._stops else sys.maxsize

    def before_write(
        self, layer_id: int, k_pool: Tensor, v_pool: Tensor, k: Tensor, v: Tensor
    ) -> None:
        """Nothing: mass is taken when the rows are written."""

    def after_write(self, layer_id: int, q: Tensor, k_pool: Tensor) -> None:
        """Add a layer's mass."""
        if layer_id in self._layers:
            for i, (lo, hi) in enumerate(self._rows):
                slots = self._slots[i]
                self.mass[i] += query_attention_mass(
                    q[lo:hi], k_pool, slots, self._positions[i], slots.numel(), self._scaling
                )
        if layer_id >= self.last_layer:
            raise StopPassError


class DeviationObserver:
    """Takes the KV deviation of rows at one layer, writes the new rows, and stops the pass.

    Parameters
    ----------
    layer : int
        The check layer.
    rows : sequence of Tensor
        Per request int64: rows of the pass whose deviation is wanted.
    slots : Tensor
        int64 ``[R]``: slots of all rows of the pass.
    metric : {"k", "v", "kv"}
        What deviates.
    """

    def __init__(
        self, layer: int, rows: Sequence[Tensor], slots: Tensor, metric: Literal["k", "v", "kv"]
    ) -> None:
        self._layer = layer
        self._rows = [r.to(slots.device) for r in rows]
        self._slots = slots
        self._metric = metric
        self._deviation: list[Tensor] = []

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
            self._deviation.append(
                kv_deviation(
                    k[rows],
                    k_pool[slots].to(k.dtype),
                    v[rows],
                    v_pool[slots].to(v.dtype),
                    self._metric,
                )
            )

    def after_write(self, layer_id: int, q: Tensor, k_pool: Tensor) -> None:
        """Stop at the check layer."""
        if layer_id >= self._layer:
            raise StopPassError

    def scores(self, reduce: Reduce) -> list[Tensor]:
        """Per request fp32, one a row, the same on every rank."""
        return [reduce(deviation) for deviation in self._deviation]
