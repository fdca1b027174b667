"""Probing passes: the signals that policies choose rows by, computed over the loaded KV before the final pass."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from chunk_cache.policies.signals import PassObserver, PassRows, ProbedRequest, Signal
from rag_kernels import LogitRules, to_host
from rag_pipeline.sglang_plugin.fusion.forward import plan as planning
from rag_pipeline.sglang_plugin.fusion.forward import scratch as scratch_slots
from rag_pipeline.sglang_plugin.fusion.forward.batch_view import (
    PADDING_SLOT,
    RequestRows,
    bind_adapters,
    make_pass,
    make_view,
)
from rag_pipeline.sglang_plugin.fusion.forward.fused_item import FusedItem
from rag_pipeline.sglang_plugin.fusion.forward.layer_pass import StopPassError
from rag_pipeline.sglang_plugin.fusion.forward.loader import Loader
from rag_pipeline.sglang_plugin.fusion.forward.row_operations import row_operations
from rag_pipeline.sglang_plugin.fusion.forward.write_guard import ProtectedWriteError, WriteGuard
from rag_pipeline.sglang_plugin.fusion.runtime.layer_rules import rules_of
from rag_pipeline.sglang_plugin.fusion.runtime.runtime import FusionRuntime


class Prober:
    """Lets the signals of one forward choose, and runs their passes (:class:`~chunk_cache.policies.ProbePasses`).

    Parameters
    ----------
    runtime : FusionRuntime
        Of this process.
    runner : ModelRunner
        SGLang's.
    batch : ForwardBatch
        In an extend mode.
    loader : Loader
        Shared by the passes of the forward.
    guard : WriteGuard
        What no pass may write.
    """

    def __init__(
        self, runtime: FusionRuntime, runner: Any, batch: Any, loader: Loader, guard: WriteGuard
    ) -> None:
        assert runtime.facts is not None
        self._runtime = runtime
        self._facts = runtime.facts
        self._runner = runner
        self._batch = batch
        self._loader = loader
        self._guard = guard
        self._items: dict[int, FusedItem] = {}

    def choose(self, items: Sequence[FusedItem]) -> None:
        """Set ``chosen`` of every item; the policy of each needs its signal."""
        self._items = {item.entry.index: item for item in items}
        groups: dict[Signal, list[FusedItem]] = {}
        for item in items:
            groups.setdefault(item.policy.signal(item.layout), []).append(item)
        for signal in sorted(groups, key=lambda signal: signal.name):
            members = groups[signal]
            *found, is_spared = to_host([*signal.choose(self, members), self._guard.is_spared])
            if is_spared:
                raise ProtectedWriteError("a draft's slots in the pool are not free")
            for item, chosen in zip(members, found, strict=True):
                item.chosen = planning.checked_choice(chosen, item.layout)

    # -- what signals are offered -------------------------------------------------------------

    @property
    def scaling(self) -> float:
        """Factor of the attention's scores."""
        return self._facts.scaling

    def rules(self, layer_id: int) -> LogitRules:
        """Window and cap of a layer."""
        return rules_of(self._facts.layers[layer_id])

    def mean(self, tensor: Tensor) -> Tensor:
        """Average over the ranks."""
        return self._runtime.group.mean(tensor)

    def total(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks."""
        return self._runtime.group.total(tensor)

    def count(self, family: str, kind: str, amount: int) -> None:
        """Add to a counter."""
        self._runtime.metrics.count(family, kind, amount)

    def scratch(self, requests: Sequence[ProbedRequest], tokens: int) -> Tensor | None:
        """Slots behind the prompts on every rank, or on none."""
        slots = scratch_slots.borrow_slots(self._runner, len(requests), tokens)
        if not scratch_slots.fits(self._runner, requests, tokens):
            slots = None
        if not self._runtime.group.all_true(slots is not None):
            return None
        return None if slots is None else self._guard.spare(slots, PADDING_SLOT)

    def run(self, rows: Sequence[PassRows], observer: PassObserver) -> Tensor | None:
        """Run a pass; return the likeliest next token of each request, None where the observer ended it."""
        parts = cast("Sequence[RequestRows]", rows)  # all rows are made by a FusedItem
        ids = self._run(parts, observer)
        last = observer.last_layer
        each = self._facts.num_layers if last is None else last + self._facts.qkv_share
        for part in parts:
            self._items[part.index].entry.state.charge(part.count, each)
        return ids

    def _run(self, rows: Sequence[RequestRows], observer: PassObserver) -> Tensor | None:
        stopping = _StoppingObserver(observer)
        fused = make_pass(self._runtime, self._loader, rows, self._guard, observer=stopping)
        fused.prepare(self._runner)
        view = make_view(self._batch, rows, fused, whole_batch=False)
        bind_adapters(self._runner, view)
        self._runtime.group.all_true(True)  # no rank starts a pass that another one does not reach
        output = None
        with contextlib.suppress(StopPassError), row_operations():
            output = self._runner._forward_raw(view, None)
        ids: list[Tensor] = []

        def conclude() -> None:
            if fused.fault is not None:
                raise fused.fault
            if output is None:
                return
            if observer.last_layer is not None:
                raise RuntimeError(
                    "a probing pass ran to the end of the model; its observer never stopped it"
                )
            ids.append(output.logits_output.next_token_logits.argmax(dim=-1).to(torch.int64))

        self._runtime.group.gather(conclude)
        return self._runtime.group.first(ids[0]) if ids else None


class _StoppingObserver:
    """Ends the pass behind the last layer that an observer wants to see."""

    def __init__(self, observer: PassObserver) -> None:
        last = observer.last_layer
        self.last_layer = sys.maxsize if last is None else last
        self.before_write = observer.before_write
        self._observer = observer

    def after_write(self, layer_id: int, q: Tensor, k_pool: Tensor) -> None:
        self._observer.after_write(layer_id, q, k_pool)
        if layer_id >= self.last_layer:
            raise StopPassError
