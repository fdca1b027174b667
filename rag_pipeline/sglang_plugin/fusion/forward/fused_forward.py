"""One fused forward: the probing passes, the rows that the policies choose, and the batch of the final pass."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rag_kernels import MeanShiftPlan, join_mean_shifts, plan_mean_shift
from rag_pipeline.sglang_plugin.fusion.forward.batch_view import (
    RequestRows,
    make_pass,
    make_view,
    ordinary_rows,
    slots_of,
)
from rag_pipeline.sglang_plugin.fusion.forward.fused_item import BatchEntry, FusedItem, plan_item
from rag_pipeline.sglang_plugin.fusion.forward.layer_pass import FusedPass
from rag_pipeline.sglang_plugin.fusion.forward.loader import Loader, LoadItem
from rag_pipeline.sglang_plugin.fusion.forward.probing import Prober
from rag_pipeline.sglang_plugin.fusion.forward.write_guard import WriteGuard
from rag_pipeline.sglang_plugin.fusion.memory.queries import add_tap
from rag_pipeline.sglang_plugin.fusion.runtime.rates import MEMORY
from rag_pipeline.sglang_plugin.fusion.runtime.runtime import FusionRuntime


class FusedForward:
    """One forward of a batch with at least one request that loads chunks or names an attention method.

    Parameters
    ----------
    runtime : FusionRuntime
        Of this process.
    runner : ModelRunner
        SGLang's.
    batch : ForwardBatch
        In an extend mode; other requests in it are ordinary.
    entries : sequence of BatchEntry
        Requests that fusion has business with.
    """

    def __init__(
        self, runtime: FusionRuntime, runner: Any, batch: Any, entries: Sequence[BatchEntry]
    ) -> None:
        assert runtime.facts is not None
        self._runtime = runtime
        self._facts = runtime.facts
        self._runner = runner
        self._batch = batch
        self._req_to_token = runner.req_to_token_pool.req_to_token
        self._items = {e.index: self._item(e) for e in entries if e.state.is_fused}
        self._memories = {e.index: e.state.memory for e in entries}
        self._loader = Loader(
            self._loads(),
            self._facts.rotary,
            runtime.timeline,
            by_layer=self._facts.rotary_by_layer,
            timer=runtime.timer,
            took=lambda num_bytes, seconds: runtime.rates.note_load(MEMORY, num_bytes, seconds),
            copies=runtime.copies,
        )
        self._guard = WriteGuard(
            int(runner.token_to_kv_pool.get_key_buffer(0).shape[0]), self._parts(is_own=False)
        )

    def prepare(self) -> tuple[Any, FusedPass]:
        """Run the probing passes; return the batch of the final pass and the pass itself.

        On a GPU the host waits once before anything is written, and once per choice of rows by a signal.
        """
        if self._req_to_token.device.type != "cpu":
            self._guard.check([*self._parts(is_own=True), *self._loader.slots])
        waiting = [item for item in self._items.values() if item.chosen is None]
        if waiting:
            began = time.perf_counter()
            Prober(self._runtime, self._runner, self._batch, self._loader, self._guard).choose(
                waiting
            )
            self._runtime.metrics.observe("probe_seconds", time.perf_counter() - began)
        began = time.perf_counter()
        rows, shifts, first = [], [], 0
        for index in range(int(self._batch.batch_size)):
            item = self._items.get(index)
            part = self._ordinary_rows(index) if item is None else self._final_rows(item)
            if item is not None:
                shifts += self._shift(item, part, first)
            rows.append(part)
            first += part.count
        if self._req_to_token.device.type != "cpu":
            shifts = join_mean_shifts(shifts)
        fused = make_pass(self._runtime, self._loader, rows, self._guard, shifts=tuple(shifts))
        fused.prepare(self._runner)
        view = make_view(self._batch, rows, fused, whole_batch=True)
        add_tap(view, [(self._memories.get(part.index), part.positions) for part in rows])
        self._runtime.metrics.observe("plan_seconds", time.perf_counter() - began)
        return view, fused

    # -- what there is ------------------------------------------------------------------------

    def _kv_slots(self, index: int) -> Tensor:
        end = int(
            self._batch.extend_prefix_lens_cpu[index] + self._batch.extend_seq_lens_cpu[index]
        )
        return slots_of(self._req_to_token, self._batch, index, end)

    def _item(self, entry: BatchEntry) -> FusedItem:
        state = entry.state
        ids = np.array(entry.req.full_untruncated_fill_ids, dtype=np.int64)
        prompt = torch.from_numpy(ids)
        layout, fresh = plan_item(
            state,
            entry.piece,
            num_layers=self._facts.num_layers,
            prompt_len=int(prompt.numel()),
            qkv_share=self._facts.qkv_share,
        )
        return FusedItem(entry, layout, self._kv_slots(entry.index), prompt, fresh)

    def _loads(self) -> list[LoadItem]:
        loads = []
        for item in self._items.values():
            piece = item.entry.piece
            for span in item.entry.state.spans:
                lo, hi = max(span.start, piece.start), min(span.end, piece.end)
                if lo < hi:
                    loads.append(
                        LoadItem(
                            record=span.lease.record,
                            chunk_offset=span.match.chunk_offset + lo - span.start,
                            slots=item.kv_slots[lo:hi],
                            delta=span.delta,
                        )
                    )
        return loads

    def _parts(self, *, is_own: bool) -> list[Tensor]:
        """Slots of every request that this forward may write, or those in front of them, which it must not."""
        parts = []
        for index in range(int(self._batch.batch_size)):
            item = self._items.get(index)
            if item is None:
                slots, start = (
                    self._kv_slots(index),
                    int(self._batch.extend_prefix_lens_cpu[index]),
                )
            else:
                slots, start = item.kv_slots, item.entry.protected_len
            parts.append(slots[start:] if is_own else slots[:start])
        return parts

    # -- the final pass -----------------------------------------------------------------------

    def _ordinary_rows(self, index: int) -> RequestRows:
        """All rows of a request that fusion does not touch, as SGLang laid them out."""
        start = int(self._batch.extend_prefix_lens_cpu[index])
        end = start + int(self._batch.extend_seq_lens_cpu[index])
        return ordinary_rows(self._req_to_token, self._batch, index, start, end)

    def _final_rows(self, item: FusedItem) -> RequestRows:
        assert item.chosen is not None
        positions = item.with_fresh(item.chosen)
        state = item.entry.state
        state.charge(int(positions.numel()), self._facts.num_layers)
        state.note_recomputed(item.chosen.tolist())
        return item.rows(positions, keeps_last=item.keeps_last)

    def _shift(self, item: FusedItem, rows: RequestRows, first: int) -> list[MeanShiftPlan]:
        strength = item.entry.state.policy.shift_strength(item.layout)
        if strength <= 0.0 or item.chosen is None or not item.chosen.numel():
            return []
        plans = [
            plan_mean_shift(
                item.layout.spans,
                rows.positions,
                item.kv_slots,
                spec,
                strength=strength,
                first_row=first,
            )
            for spec in self._facts.rotaries
        ]
        return [plan for plan in plans if plan.num_shifted]
