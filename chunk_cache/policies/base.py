"""The interface of a selection policy, and the work it is charged for.

A policy names the reused tokens that are computed anew. Everything fresh, the last token included, is always
computed and never up to a policy. Work is counted in *row-layers*: one token through one layer. At a nominal
ratio ``r`` a policy may spend ``r * num_reused * num_layers`` row-layers, and whatever it computes to make its
choice (a full first layer, a scoring pass) comes out of that sum.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from chunk_cache.policies.layout import ReuseLayout

Signal = Literal["none", "deviation", "attention"]


class Policy(ABC):
    """Chooses the reused tokens to recompute.

    How a caller drives it, by ``signal``:

    ``none``
        ``select(layout)`` gives the rows before layer 0; the batch simply has fewer rows.
    ``attention``
        Run the fresh rows over the loaded KV through layers ``0 .. stop - 1`` of :meth:`scoring_layers`' range,
        average the attention mass of the question rows over the layers of the range, then
        ``select(layout, scores=mass[reused_positions])``; where :meth:`draft_length` is not 0 the pass goes on to
        the logits, a draft of so many tokens follows, and :meth:`select_with_draft` takes its average mass too. The
        main pass then runs from layer 0 with known rows.
        When :meth:`needs_signal` is False for a layout, skip the pass: ``select(layout)`` answers alone.
    ``deviation``
        Where :meth:`needs_signal` is False, ``select(layout)`` answers before layer 0. Else compute every row up to the first check layer. At check layer ``i`` compute K and V of the rows still
        computed, take :attr:`metric`'s deviation of the reused ones, sum it over tensor-parallel ranks, and call
        ``select(layout, stage=i, scores=deviation, candidates=positions)``; go on with what it returns.

    Every choice depends on the arguments only, equal scores are broken by position: ranks that are given the
    same scores choose the same rows.
    """

    name: ClassVar[str]
    config_type: ClassVar[type[Any]]
    """Frozen dataclass of the options; the policy is made with one, and clients set its fields by name."""
    signal: ClassVar[Signal]
    config: Any
    """Options of this policy."""

    @abstractmethod
    def __init__(self, config: Any) -> None:
        """Make the policy with its options, which were checked by their type."""

    @property
    def identity(self) -> str:
        """Name and every option: two policies with the same identity choose the same rows."""
        return f"{self.name} {self.config!r}"

    @property
    @abstractmethod
    def ratio(self) -> float:
        """Nominal share of the reused tokens' full computation, 0 to 1."""

    @property
    def metric(self) -> Literal["k", "v", "kv"]:
        """Deviation metric, for ``signal == "deviation"``."""
        return "v"

    @property
    def mean_shift(self) -> float:
        """Strength of the mean shift on rows that stay cached; 0 for none."""
        return 0.0

    def shift_strength(self, layout: ReuseLayout) -> float:
        """Strength of the mean shift for this request; by default as configured."""
        return self.mean_shift

    @property
    def rows_known_before_layer_0(self) -> bool:
        """No pass over the model is needed to choose."""
        return self.signal == "none"

    def check_layers(self, num_layers: int) -> tuple[int, ...]:
        """Layers whose new K and V the policy wants to see, rising."""
        return ()

    def scoring_layers(self, num_layers: int) -> range:
        """Layers whose attention is averaged; the scoring pass ends before ``range.stop``."""
        return range(0)

    def draft_length(self, layout: ReuseLayout) -> int:
        """Tokens of a draft answer whose attention counts beside the question's; 0 for none."""
        return 0

    def needs_signal(self, layout: ReuseLayout) -> bool:
        """Whether the signal must be computed for this request.

        False where the choice is known without it: the budget leaves no token, or all of them.
        """
        return self.signal != "none" and 0 < self.num_selected(layout)[-1] < layout.num_reused

    @abstractmethod
    def num_selected(self, layout: ReuseLayout) -> tuple[int, ...]:
        """Reused tokens computed after each stage; one number where there is one stage, never rising."""

    @abstractmethod
    def select(
        self,
        layout: ReuseLayout,
        *,
        scores: Tensor | None = None,
        candidates: Tensor | None = None,
        stage: int = 0,
    ) -> Tensor:
        """Positions of the reused tokens to compute from here on.

        Parameters
        ----------
        layout : ReuseLayout
            The request.
        scores : Tensor, optional
            ``[len(candidates)]`` the policy's signal; the higher, the sooner recomputed.
        candidates : Tensor, optional
            Integer positions that the scores belong to, rising; by default all reused positions.
        stage : int
            Index into :meth:`check_layers`.

        Returns
        -------
        Tensor
            int64, rising, a subset of the candidates, on the device of the scores (else the CPU).
        """

    def select_with_draft(self, layout: ReuseLayout, *, scores: Tensor, drafted: Tensor) -> Tensor:
        """Positions of the reused tokens to compute, chosen by the question and a draft of the answer.

        Parameters
        ----------
        layout : ReuseLayout
            The request.
        scores, drafted : Tensor
            ``[num_reused]`` attention mass of the question's rows, and of the draft's.

        Returns
        -------
        Tensor
            As :meth:`select`; by default what it chooses by the sum.
        """
        return self.select(layout, scores=scores + drafted)

    @abstractmethod
    def computed_row_layers(self, layout: ReuseLayout, kept: Sequence[int] | None = None) -> float:
        """Row-layers computed on behalf of the reused tokens, every overhead included, fresh rows apart.

        ``kept`` are the numbers really kept after each stage; by default :meth:`num_selected`.
        """

    def charged_ratio(self, layout: ReuseLayout, kept: Sequence[int] | None = None) -> float:
        """Work of the policy as a share of computing all reused tokens: what the nominal ratio promises."""
        whole = layout.num_reused * layout.num_layers
        return self.computed_row_layers(layout, kept) / whole if whole else 0.0

    def computed_fraction(self, layout: ReuseLayout, kept: Sequence[int] | None = None) -> float:
        """All row-layers computed, fresh rows included, as a share of prefilling everything behind the prefix."""
        whole = (layout.prompt_len - layout.exact_len) * layout.num_layers
        if not whole:
            return 0.0
        return (
            self.computed_row_layers(layout, kept) + layout.num_fresh * layout.num_layers
        ) / whole


def top_positions(scores: Tensor, candidates: Tensor, count: int) -> Tensor:
    """Return the ``count`` highest-scored candidates, rising by position; equal scores go to the earlier one.

    A score that is not a number counts as the highest: what cannot be judged is recomputed.
    """
    if scores.shape != candidates.shape:
        raise ValueError(
            f"{tuple(scores.shape)} scores for {tuple(candidates.shape)} candidates; one each is needed."
        )
    count = min(count, candidates.numel())
    if count <= 0:
        return candidates.new_empty(0, dtype=torch.int64, device=scores.device)
    clean = torch.nan_to_num(
        scores.float(), nan=float("inf"), posinf=float("inf"), neginf=float("-inf")
    )
    # A stable sort, because topk leaves the order of equal values open and ranks must agree.
    first = torch.sort(clean, descending=True, stable=True).indices[:count]
    return candidates.to(scores.device, torch.int64)[first.sort().values]


def check_ratio(ratio: float, name: str = "ratio") -> None:
    """Refuse a share outside 0 to 1."""
    if not 0.0 <= ratio <= 1.0:
        raise ValueError(f"{name} is {ratio}; it must be between 0 and 1.")
