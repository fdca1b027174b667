"""Probing passes: the signal that policies choose rows by, computed over the loaded KV before the final pass."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rag_pipeline.sglang_plugin.fusion.forward import draft
from rag_pipeline.sglang_plugin.fusion.forward.batch_view import (
    RequestRows,
    bind_adapters,
    make_pass,
    make_view,
)
from rag_pipeline.sglang_plugin.fusion.forward.fused_item import FusedItem
from rag_pipeline.sglang_plugin.fusion.forward.layer_pass import Loader, Observer, StopPassError
from rag_pipeline.sglang_plugin.fusion.forward.probes import DeviationObserver, MassObserver
from rag_pipeline.sglang_plugin.fusion.forward.write_guard import WriteGuard
from rag_pipeline.sglang_plugin.fusion.runtime.runtime import FusionRuntime


class Prober:
    """Runs the probing passes of one forward and lets the policies choose.

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

    def choose(self, items: Sequence[FusedItem]) -> None:
        """Set ``chosen`` of every item."""
        self._by_attention([i for i in items if i.entry.state.policy.signal == "attention"])
        self._by_deviation([i for i in items if i.entry.state.policy.signal == "deviation"])

    # -- the question's attention --------------------------------------------------------------

    def _by_attention(self, items: Sequence[FusedItem]) -> None:
        groups: dict[tuple[range, int], list[FusedItem]] = {}
        for item in items:
            policy = item.entry.state.policy
            layers = policy.scoring_layers(self._facts.num_layers)
            groups.setdefault((layers, policy.draft_length(item.layout)), []).append(item)
        for (layers, drafted), members in groups.items():
            asked, extra = self._attention_scores(members, layers, drafted)
            for i, item in enumerate(members):
                policy, at = item.entry.state.policy, item.candidates.to(asked[i].device)
                if extra is None:
                    chosen = policy.select(item.layout, scores=asked[i][at])
                else:
                    chosen = policy.select_with_draft(
                        item.layout, scores=asked[i][at], drafted=extra[i][at]
                    )
                item.chosen = chosen.to("cpu", torch.int64)

    def _attention_scores(
        self, members: Sequence[FusedItem], layers: range, drafted: int
    ) -> tuple[list[Tensor], list[Tensor] | None]:
        """Mass of the question's rows on every position, fp32 ``[kv_len]`` each; the same of a draft, where there is one."""
        scratch = self._scratch(members, drafted) if drafted else None
        rows = [item.rows(item.fresh) for item in members]
        asking = [
            int((part.positions > part.positions[-1] - item.layout.question_len).sum())
            for item, part in zip(members, rows, strict=True)
        ]
        total, ids = self._mass(members, rows, asking, layers, stops=scratch is None)
        if scratch is None or ids is None:
            return total, None
        drafts = [
            draft.look_up(int(first), item, mass, drafted)
            for first, item, mass in zip(ids.tolist(), members, total, strict=True)
        ]
        rows = draft.rows_behind(members, drafts, scratch)
        more, _ = self._mass(members, rows, [part.count for part in rows], layers, stops=True)
        self._runtime.metrics.count("drafts", "scored", len(members))
        return total, more

    def _scratch(self, members: Sequence[FusedItem], drafted: int) -> Tensor | None:
        """Slots for the drafts on every rank, or on none."""
        slots = draft.borrow_slots(self._runner, len(members), drafted)
        if not draft.fits(self._runner, members, drafted):
            slots = None
        if self._runtime.group.all_true(slots is not None):
            return slots
        self._runtime.metrics.count("drafts", "left_out", len(members))
        return None

    def _mass(
        self,
        members: Sequence[FusedItem],
        rows: Sequence[RequestRows],
        asking: Sequence[int],
        layers: range,
        *,
        stops: bool,
    ) -> tuple[list[Tensor], Tensor | None]:
        """Run a pass; mass of each request's last `asking` rows, and its likeliest next token unless it stops."""
        spans, positions, first = [], [], 0
        for part, count in zip(rows, asking, strict=True):
            first += part.count
            spans.append((first - count, first))
            positions.append(part.positions[part.count - count :])
        slots = [part.kv_slots for part in rows]
        observer = MassObserver(layers, spans, positions, slots, self._facts.scaling, stops=stops)
        ids = self._run(rows, observer)
        each = layers.stop - 1 + self._facts.qkv_share if stops else self._facts.num_layers
        for item, part in zip(members, rows, strict=True):
            item.entry.state.charge(part.count, each)
        # Averaged at once: what is looked up by it must be the same on every rank.
        return [self._runtime.group.mean(mass) for mass in observer.mass], ids

    # -- the deviation of recomputed KV --------------------------------------------------------

    def _by_deviation(self, items: Sequence[FusedItem]) -> None:
        """Filter the reused tokens check layer by check layer, by how far their KV deviates."""
        groups: dict[tuple[tuple[int, ...], str], list[FusedItem]] = {}
        for item in items:
            policy = item.entry.state.policy
            key = (policy.check_layers(self._facts.num_layers), policy.metric)
            groups.setdefault(key, []).append(item)
        for (checks, _), members in groups.items():
            for stage, layer in enumerate(checks):
                self._check(members, stage, layer)
            for item in members:
                item.chosen = item.candidates

    def _check(self, members: Sequence[FusedItem], stage: int, layer: int) -> None:
        rows, wanted, first = [], [], 0
        for item in members:
            positions = item.with_fresh(item.candidates)
            rows.append(item.rows(positions))
            wanted.append(torch.searchsorted(positions, item.candidates) + first)
            first += int(positions.numel())
        slots = torch.cat([part.row_slots for part in rows])
        observer = DeviationObserver(layer, wanted, slots, members[0].entry.state.policy.metric)
        self._run(rows, observer)
        for item, part, scores in zip(
            members, rows, observer.scores(self._runtime.group.total), strict=True
        ):
            chosen = item.entry.state.policy.select(
                item.layout, scores=scores, candidates=item.candidates, stage=stage
            )
            item.candidates = chosen.to("cpu", torch.int64)
            item.kept.append(int(item.candidates.numel()))
            item.entry.state.charge(part.count, layer + self._facts.qkv_share)

    # -- passes --------------------------------------------------------------------------------

    def _run(self, rows: Sequence[RequestRows], observer: Observer) -> Tensor | None:
        """Run a pass; return the likeliest next token of each request, None where the observer stopped it."""
        fused = make_pass(self._runtime, self._loader, rows, self._guard, observer=observer)
        view = make_view(self._batch, rows, fused, whole_batch=False)
        bind_adapters(self._runner, view)
        self._runtime.group.all_true(True)  # no rank starts a pass that another one does not reach
        output = None
        with contextlib.suppress(StopPassError):
            output = self._runner._forward_raw(view, None)
        ids: list[Tensor] = []

        def conclude() -> None:
            if fused.fault is not None:
                raise fused.fault
            if output is None:
                return
            if observer.last_layer < self._facts.num_layers:
                raise RuntimeError(
                    "a probing pass ran to the end of the model; its observer never stopped it"
                )
            ids.append(output.logits_output.next_token_logits.argmax(dim=-1).to(torch.int64))

        self._runtime.group.gather(conclude)
        return self._runtime.group.first(ids[0]) if ids else None
