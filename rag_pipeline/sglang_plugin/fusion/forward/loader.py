"""Chunk KV into the pool, layer by layer: each layer of a forward waits for its own layer of the records only."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence

from torch import Tensor

from chunk_cache import LayerKV, LayerReader, Timeline, layout_named
from rag_kernels import RotarySpec, plan_span_load
from rag_pipeline.sglang_plugin.fusion.runtime.copy_stream import Copied, CopyStream
from rag_pipeline.sglang_plugin.fusion.runtime.device_timer import DeviceTimer

_SAMPLED = 4
"""Of so many layers the loading of one is measured."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LoadItem:
    """Run ``[chunk_offset, chunk_offset + len(slots))`` of a record, to be written at ``slots``.

    ``delta`` is the new position minus the one that the record was computed at.
    """

    record: LayerReader
    chunk_offset: int
    slots: Tensor
    delta: int

    def read(self, layer_id: int) -> LayerKV:
        """The run in one layer; waits until it is there."""
        return self.record.layer(
            layer_id, self.chunk_offset, self.chunk_offset + self.slots.numel()
        )


class Loader:
    """Writes the loads of one forward into a layer's pool on the first touch of the layer.

    The passes of a forward share it: what a later pass finds in the pool was loaded, or computed by an
    earlier pass on top of it.

    Parameters
    ----------
    loads : sequence of LoadItem
        What to write.
    spec : RotarySpec
        How keys are moved.
    by_layer : sequence of RotarySpec, optional
        The same for each layer, where they differ.
    timeline : Timeline, optional
        Where waits and computing are recorded.
    timer : DeviceTimer, optional
        Measures the writing of some layers.
    took : callable
        Told their bytes and seconds.
    copies : CopyStream, optional
        Brings a layer to the device while the one before it is computed, if its records have it by then.
    """

    def __init__(
        self,
        loads: Sequence[LoadItem],
        spec: RotarySpec,
        timeline: Timeline | None = None,
        *,
        by_layer: Sequence[RotarySpec] = (),
        timer: DeviceTimer | None = None,
        took: Callable[[int, float], None] = lambda num_bytes, seconds: None,
        copies: CopyStream | None = None,
    ) -> None:
        self._timeline = timeline
        self._timer = timer
        self._took = took
        self._copies = copies
        self._ahead: dict[int, list[Copied]] = {}
        """Of the next layer, per part, what is on its way to the device."""
        self.spent_s = 0.0
        """Seconds of the host in :meth:`ensure`, waits included."""
        self._ended = 0.0
        self._last = 0
        self._loads = list(loads)
        self._spec, self._by_layer = spec, by_layer
        by_layout: dict[str, list[LoadItem]] = {}
        for item in self._loads:
            by_layout.setdefault(item.record.layout, []).append(item)
        self._parts = [
            (
                layout_named(name),
                items,
                {
                    id(one): plan_span_load(
                        [item.slots for item in items], [item.delta for item in items], one
                    )
                    for one in {id(one): one for one in by_layer or (spec,)}.values()
                },
            )
            for name, items in by_layout.items()
        ]
        self._done: set[int] = set()

    @property
    def slots(self) -> list[Tensor]:
        """All slots that are written, load by load."""
        return [item.slots for item in self._loads]

    def spec_of(self, layer_id: int) -> RotarySpec:
        """How the keys of a layer are moved."""
        return self._by_layer[layer_id] if self._by_layer else self._spec

    def ensure(self, layer_id: int, rotated_pool: Tensor, rest_pool: Tensor) -> None:
        """Load a layer, given as :meth:`~chunk_cache.KVLayout.pool_layer` has it, unless that was done.

        Waits for the readers of that layer.
        """
        if layer_id in self._done:
            return
        self._done.add(layer_id)
        began = time.perf_counter()
        if self._timeline is not None and layer_id > 0:
            self._timeline.add("compute", layer_id - 1, self._ended)
        ahead = self._ahead.pop(layer_id, None) or self._begin_copies(layer_id)
        for index, (layout, items, plans) in enumerate(self._parts):
            plan = plans[id(self.spec_of(layer_id))]
            layers = [] if self._copies else [item.read(layer_id) for item in items]
            timer = self._timer if layer_id % _SAMPLED == 0 else None
            moment = None if timer is None else timer.begin()
            if self._copies is not None:
                layers = self._copies.arrive(ahead[index])
            layout.load_inplace(rotated_pool, rest_pool, layers, plan)
            if timer is not None:
                num_bytes = sum(tensor.nbytes for run in layers for tensor in run)
                timer.end(moment, functools.partial(self._took, num_bytes))
        if self._copies is not None and self._is_there(layer_id + 1):
            self._ahead[layer_id + 1] = self._begin_copies(layer_id + 1)
        self.spent_s += time.perf_counter() - began
        self._last = layer_id
        if self._timeline is not None:
            self._ended = self._timeline.add("wait", layer_id, began)

    def _begin_copies(self, layer_id: int) -> list[Copied]:
        """Wait for the readers of a layer, and begin to copy what they have."""
        if self._copies is None:
            return []
        return [
            self._copies.copy([item.read(layer_id) for item in items])
            for _, items, _ in self._parts
        ]

    def _is_there(self, layer_id: int) -> bool:
        """Whether all records have a layer, so that nobody waits for it."""
        records = [item.record for item in self._loads]
        return all(
            layer_id < getattr(one, "num_filled", one.num_layers) and layer_id < one.num_layers
            for one in records
        )

    def finish(self) -> None:
        """Note that the forward has ended: the last layer was computed."""
        if self._timeline is not None and self._ended:
            self._timeline.add("compute", self._last, self._ended)
