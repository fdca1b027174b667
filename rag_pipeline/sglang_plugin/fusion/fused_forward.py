"""One fused forward: the probing passes, the rows that the policies choose, and the batch of the final pass."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from chunk_cache.policies import ReuseLayout
from rag_kernels import MeanShiftPlan, plan_mean_shift
from rag_pipeline.sglang_plugin.fusion import plan as planning
from rag_pipeline.sglang_plugin.fusion.attention import (
    FusedPass,
    Loader,
    LoadItem,
    Observer,
    StopPassError,
)
from rag_pipeline.sglang_plugin.fusion.batch_view import RequestRows, make_view, plan_rows
from rag_pipeline.sglang_plugin.fusion.plan import Piece
from rag_pipeline.sglang_plugin.fusion.probes import DeviationObserver, MassObserver
from rag_pipeline.sglang_plugin.fusion.request_state import RequestState
from rag_pipeline.sglang_plugin.fusion.runtime import FusionRuntime


class FusedPassError(RuntimeError):
    """A pass failed on some tensor-parallel rank; every rank raises it and prefills as usual."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PlanEntry:
    """One request of a batch that fusion has business with."""

    index: int
    req: Any
    state: RequestState
    piece: Piece


class _Item:
    """Working state of one fused request during a forward."""

    __slots__ = ("candidates", "chosen", "entry", "fresh", "kept", "kv_slots", "layout", "prompt")

    def __init__(
        self,
        entry: PlanEntry,
        layout: ReuseLayout,
        kv_slots: Tensor,
        prompt: Tensor,
        fresh: Tensor,
    ) -> None:
        self.entry = entry
        self.layout = layout
        self.kv_slots = kv_slots
        self.prompt = prompt
        self.fresh = fresh
        self.chosen = planning.early_rows(entry.state.policy, layout, entry.piece)
        self.candidates = layout.reused_positions()
        self.kept: list[int] = []

    def rows(self, positions: Tensor, *, keeps_last: bool = False) -> RequestRows:
        """Rows of this request at rising positions."""
        return RequestRows(
            index=self.entry.index,
            positions=positions,
            ids=self.prompt[positions].to(self.kv_slots.device),
            kv_slots=self.kv_slots,
            keeps_last=keeps_last,
        )

    @property
    def keeps_last(self) -> bool:
        """Whether the last row only ends a piece inside a chunk: it must not change that chunk's KV."""
        piece, last = self.entry.piece, self.entry.piece.end - 1
        chosen = self.chosen is not None and bool((self.chosen == last).any())
        loaded = any(start <= last < end for start, end in self.entry.state.loads)
        return loaded and not chosen and not piece.is_last


class FusedForward:
    """One forward of a batch that holds at least one request with loaded chunks.

    Parameters
    ----------
    runtime : FusionRuntime
        Of this process.
    runner : ModelRunner
        SGLang's.
    batch : ForwardBatch
        In an extend mode; other requests in it are ordinary.
    entries : sequence of PlanEntry
        Requests that fusion has business with.
    """

    def __init__(
        self, runtime: FusionRuntime, runner: Any, batch: Any, entries: Sequence[PlanEntry]
    ) -> None:
        assert runtime.facts is not None
        self._runtime = runtime
        self._facts = runtime.facts
        self._runner = runner
        self._batch = batch
        self._req_to_token = runner.req_to_token_pool.req_to_token
        self._items = {e.index: self._item(e) for e in entries if e.state.spans}
        self._loader = Loader(self._loads(), (), self._facts.rotary)

    def prepare(self) -> tuple[Any, FusedPass]:
        """Run the probing passes; return the batch of the final pass and the pass itself."""
        waiting = [item for item in self._items.values() if item.chosen is None]
        if waiting:
            began = time.perf_counter()
            attention = [i for i in waiting if i.entry.state.policy.signal == "attention"]
            deviation = [i for i in waiting if i.entry.state.policy.signal == "deviation"]
            self._probe_attention(attention)
            self._probe_deviation(deviation)
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
        fused = self._make_pass(rows, None, tuple(shifts))
        view = make_view(self._batch, rows, fused, whole_batch=True)
        self._runtime.metrics.observe("plan_seconds", time.perf_counter() - began)
        return view, fused

    # -- what there is ------------------------------------------------------------------------

    def _kv_slots(self, index: int) -> Tensor:
        end = int(
            self._batch.extend_prefix_lens_cpu[index] + self._batch.extend_seq_lens_cpu[index]
        )
        slots: Tensor = self._req_to_token[self._batch.req_pool_indices[index], :end]
        return slots.to(torch.int64)

    def _item(self, entry: PlanEntry) -> _Item:
        state = entry.state
        prompt = torch.tensor(entry.req.full_untruncated_fill_ids, dtype=torch.int64)
        # Earlier turns are no more up to a policy than the exact prefix is.
        exact = state.turns_end or planning.exact_end(
            [(s.start, s.end, s.delta) for s in state.spans if not s.is_behind_passage],
            state.radix_len,
        )
        fresh = planning.fresh_positions(state.loads, entry.piece)
        layout = planning.make_layout(
            state.loads,
            num_layers=self._facts.num_layers,
            prompt_len=int(prompt.numel()),
            radix_len=state.radix_len,
            exact_len=min(exact, int(prompt.numel())),
            qkv_share=self._facts.qkv_share,
            scoring_rows=int(fresh.numel()),
        )
        return _Item(entry, layout, self._kv_slots(entry.index), prompt, fresh)

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

    # -- passes -------------------------------------------------------------------------------

    def _make_pass(
        self,
        rows: Sequence[RequestRows],
        observer: Observer | None,
        shifts: tuple[MeanShiftPlan, ...] = (),
    ) -> FusedPass:
        plan, slots = plan_rows(rows, self._facts)
        return FusedPass(
            row_slots=slots,
            attention=plan,
            loader=self._loader,
            scaling=self._facts.scaling,
            shifts=shifts,
            observer=observer,
            holds_faults=self._runtime.group.size > 1,
        )

    def _run_probe(self, rows: Sequence[RequestRows], fused: FusedPass) -> None:
        view = make_view(self._batch, rows, fused, whole_batch=False)
        try:
            self._runner._forward_raw(view, None)
        except StopPassError:
            if not self._runtime.group.all_true(fused.fault is None):
                raise FusedPassError("a probing pass failed on a rank") from fused.fault
            return
        raise RuntimeError(
            "a probing pass ran to the end of the model; its observer never stopped it"
        )

    def _probe_attention(self, items: Sequence[_Item]) -> None:
        """Score the reused tokens by the question's attention and let the policies choose."""
        groups: dict[range, list[_Item]] = {}
        for item in items:
            layers = item.entry.state.policy.scoring_layers(self._facts.num_layers)
            groups.setdefault(layers, []).append(item)
        for layers, members in groups.items():
            rows = [item.rows(item.fresh) for item in members]
            spans, positions, first = [], [], 0
            for item, part in zip(members, rows, strict=True):
                asking = int(
                    (part.positions >= part.positions[-1] + 1 - item.layout.question_len).sum()
                )
                spans.append((first + part.count - asking, first + part.count))
                positions.append(part.positions[part.count - asking :])
                first += part.count
            observer = MassObserver(
                layers, spans, positions, [i.kv_slots for i in members], self._facts.scaling
            )
            self._run_probe(rows, self._make_pass(rows, observer))
            for item, mass in zip(members, observer.scores(self._runtime.group.mean), strict=True):
                scores = mass[item.candidates.to(mass.device)]
                chosen = item.entry.state.policy.select(item.layout, scores=scores)
                item.chosen = chosen.to("cpu", torch.int64)
                state = item.entry.state
                state.row_layers += (len(layers) + layers.start - 1) * item.fresh.numel()
                state.row_layers += self._facts.qkv_share * item.fresh.numel()

    def _probe_deviation(self, items: Sequence[_Item]) -> None:
        """Filter the reused tokens check layer by check layer, by how far their KV deviates."""
        groups: dict[tuple[tuple[int, ...], str], list[_Item]] = {}
        for item in items:
            policy = item.entry.state.policy
            key = (policy.check_layers(self._facts.num_layers), policy.metric)
            groups.setdefault(key, []).append(item)
        for (checks, _), members in groups.items():
            for stage, layer in enumerate(checks):
                self._check(members, stage, layer)
            for item in members:
                item.chosen = item.candidates

    def _check(self, members: Sequence[_Item], stage: int, layer: int) -> None:
        rows, wanted, first = [], [], 0
        for item in members:
            positions = planning.union_rows(item.fresh, item.candidates)
            rows.append(item.rows(positions))
            wanted.append(torch.searchsorted(positions, item.candidates) + first)
            first += int(positions.numel())
        fused = self._make_pass(rows, None)
        observer = DeviationObserver(
            layer, wanted, fused.row_slots, members[0].entry.state.policy.metric
        )
        fused.observer = observer
        self._run_probe(rows, fused)
        for item, part, scores in zip(
            members, rows, observer.scores(self._runtime.group.total), strict=True
        ):
            chosen = item.entry.state.policy.select(
                item.layout, scores=scores, candidates=item.candidates, stage=stage
            )
            item.candidates = chosen.to("cpu", torch.int64)
            item.kept.append(int(item.candidates.numel()))
            item.entry.state.row_layers += (layer + self._facts.qkv_share) * part.count

    # -- the final pass -----------------------------------------------------------------------

    def _ordinary_rows(self, index: int) -> RequestRows:
        """All rows of a request that fusion does not touch, as SGLang laid them out."""
        start = int(self._batch.extend_prefix_lens_cpu[index])
        count = int(self._batch.extend_seq_lens_cpu[index])
        first = sum(self._batch.extend_seq_lens_cpu[:index])
        return RequestRows(
            index=index,
            positions=torch.arange(start, start + count),
            ids=self._batch.input_ids[first : first + count],
            kv_slots=self._kv_slots(index),
        )

    def _final_rows(self, item: _Item) -> RequestRows:
        assert item.chosen is not None
        positions = planning.union_rows(item.fresh, item.chosen)
        state = item.entry.state
        state.row_layers += self._facts.num_layers * int(positions.numel())
        state.report.recomputed_tokens += int(item.chosen.numel())
        state.recomputed += item.chosen.tolist()
        return item.rows(positions, keeps_last=item.keeps_last)

    def _shift(self, item: _Item, rows: RequestRows, first: int) -> list[MeanShiftPlan]:
        strength = item.entry.state.policy.shift_strength(item.layout)
        if strength <= 0.0 or item.chosen is None or not item.chosen.numel():
            return []
        plan = plan_mean_shift(
            item.layout.spans,
            rows.positions,
            item.kv_slots,
            self._facts.rotary,
            strength=strength,
            first_row=first,
        )
        return [plan] if plan.num_shifted else []
