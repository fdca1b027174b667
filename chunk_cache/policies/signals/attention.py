"""Attention signal: the mass that the question's rows, and those of a draft of the answer, put on reused tokens.

The fresh rows run over the loaded KV up to the last layer of a range; the mass is the mean over question rows, heads
and layers of the range. With a draft the pass goes on to the logits, and the draft's rows take a pass of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from chunk_cache.policies.layout import ReuseLayout
from chunk_cache.policies.signals import draft
from chunk_cache.policies.signals.base import (
    PassObserver,
    PassRows,
    ProbedRequest,
    ProbePasses,
    Signal,
)
from rag_kernels import LogitRules, attention_mass, plan_attention_mass, to_device, to_host


@dataclass(frozen=True, slots=True)
class AttentionSignal(Signal):
    """Scores for :meth:`ScoredPolicy.choose`: fp32 ``[num_reused]`` mass of the question.

    With a draft ``[2, num_reused]``: of the question, and of the draft. A draft is left out, as if no token of it had
    been asked for, where the pool has no free slots for it or a prompt would outgrow the context.
    """

    name = "attention"

    layers: range
    """Layers whose attention is averaged; not empty."""
    draft_tokens: int = 0
    """Most tokens of a draft; 0 for none."""

    def cost(self, layout: ReuseLayout, kept: Sequence[int] = ()) -> int:
        """The pass of the fresh rows, and that of the draft; how many tokens are kept makes no difference."""
        if self.draft_tokens:
            # To the logits with the question, for the draft's first token; the draft's own pass stops early again.
            question = layout.scoring_rows * layout.num_layers
            return question + self.draft_tokens * self.layers.stop
        return layout.scoring_rows * self.layers.stop

    def choose(self, passes: ProbePasses, requests: Sequence[ProbedRequest]) -> list[Tensor]:
        """One pass for the question, and one for the drafts."""
        asked, drafted = self._masses(passes, requests)
        chosen = []
        for i, request in enumerate(requests):
            at = to_device(request.candidates, asked[i].device)
            scores = asked[i][at]
            if drafted is not None:
                scores = torch.stack([scores, drafted[i][at]])
            chosen.append(request.policy.choose(request.layout, scores, at))
        return chosen

    def _masses(
        self, passes: ProbePasses, requests: Sequence[ProbedRequest]
    ) -> tuple[list[Tensor], list[Tensor] | None]:
        """Mass on every position, fp32 ``[kv_len]`` each: of the question's rows, and of the draft's if there is one."""
        scratch = None
        if self.draft_tokens:
            scratch = passes.scratch(requests, self.draft_tokens)
            if scratch is None:
                passes.count("drafts", "left_out", len(requests))
        rows = [request.rows(request.fresh) for request in requests]
        asking = [
            int((part.positions > part.positions[-1] - request.layout.question_len).sum())
            for request, part in zip(requests, rows, strict=True)
        ]
        asked, ids = self._mass(passes, rows, asking, stops=scratch is None)
        if scratch is None or ids is None:
            return asked, None
        likeliest, *seen = to_host([ids, *asked])
        drafts = [
            draft.look_up(first, request.prompt, request.chunk_spans, mass, self.draft_tokens)
            for first, request, mass in zip(likeliest.tolist(), requests, seen, strict=True)
        ]
        rows = [
            request.rows_behind(guess, own)
            for request, guess, own in zip(requests, drafts, scratch, strict=True)
        ]
        drafted, _ = self._mass(passes, rows, [part.count for part in rows], stops=True)
        passes.count("drafts", "scored", len(requests))
        return asked, drafted

    def _mass(
        self,
        passes: ProbePasses,
        rows: Sequence[PassRows],
        asking: Sequence[int],
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
        observer = MassObserver(
            self.layers,
            spans,
            positions,
            slots,
            passes.scaling,
            stops=stops,
            rules=[passes.rules(layer) for layer in self.layers],
        )
        ids = passes.run(rows, observer)
        # Averaged at once: what is looked up by it must be the same on every rank.
        return [passes.mean(mass) for mass in observer.mass], ids


class MassObserver(PassObserver):
    """Sums up the attention mass of chosen rows over a range of layers.

    Parameters
    ----------
    layers : range
        Layers to look at.
    rows : sequence of (int, int)
        Per request: rows of the pass whose mass is wanted.
    positions : sequence of Tensor
        Per request int64: absolute positions of those rows.
    slots : sequence of Tensor
        Per request int64 ``[kv_len]``.
    scaling : float
        Factor of the attention's scores.
    stops : bool
        The pass ends in the last layer of the range; False lets it go on to its logits.
    rules : sequence of LogitRules
        Window and cap of each layer of the range; none where it is empty.
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
        rules: Sequence[LogitRules] = (),
    ) -> None:
        self._layers = layers
        self._stops = stops
        self._rules = dict(zip(layers, rules, strict=False))
        self._plan = plan_attention_mass(rows, positions, slots)
        self._scaling = scaling
        self._mass = torch.zeros(
            sum(self._plan.lengths), dtype=torch.float32, device=slots[0].device
        )

    @property
    def mass(self) -> list[Tensor]:
        """Per request fp32 ``[kv_len]``: of this rank's heads."""
        return list(self._mass.split(self._plan.lengths))

    @property
    def last_layer(self) -> int | None:
        """Last layer of the range."""
        return self._layers.stop - 1 if self._stops else None

    def after_write(self, layer_id: int, q: Tensor, k_pool: Tensor) -> None:
        """Add a layer's mass."""
        if layer_id not in self._layers:
            return
        rules = self._rules.get(layer_id, LogitRules())
        self._mass += attention_mass(q, k_pool, self._plan, self._scaling, rules)
