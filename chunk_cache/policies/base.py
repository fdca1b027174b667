"""The interface of a selection policy, and the work it is charged for.

A policy names the reused tokens that are computed anew. Everything fresh, the last token included, is always
computed and never up to a policy. Work is counted in *row-layers*: one token through one layer. At a nominal
ratio ``r`` a policy may spend ``r * num_reused * num_layers`` row-layers, and whatever it computes to make its
choice (a full first layer, a scoring pass) comes out of that sum.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from chunk_cache.policies.layout import ReuseLayout


@dataclass(frozen=True, kw_only=True, slots=True)
class NoOptions:
    """Configuration of a policy that leaves nothing to choose."""


class Policy(ABC):
    """Chooses the reused tokens to recompute, before layer 0; :class:`ScoredPolicy` asks the model first.

    A subclass sets ``name`` and ``config_type``, and writes :meth:`select`. Every choice depends on the arguments
    only, so tensor-parallel ranks choose the same rows.

    Parameters
    ----------
    config : object
        Options, an instance of ``config_type``, which has checked them.
    """

    name: ClassVar[str]
    """Its name in :data:`~chunk_cache.policies.POLICIES`."""
    config_type: ClassVar[type[Any]]
    """Frozen dataclass of the options; the policy is made with one, and clients set its fields by name."""
    config: Any
    """Options of this policy."""

    def __init__(self, config: Any) -> None:
        self.config = config

    @property
    def identity(self) -> str:
        """Name and every option: two policies with the same identity choose the same rows."""
        return f"{self.name} {self.config!r}"

    @property
    def ratio(self) -> float:
        """Nominal share of the reused tokens' full computation, 0 to 1; by default the option of that name."""
        ratio: float = self.config.ratio
        return ratio

    @abstractmethod
    def select(self, layout: ReuseLayout) -> Tensor:
        """Positions of the reused tokens to compute, known before layer 0.

        Returns
        -------
        Tensor
            int64 on the host, rising, a subset of the layout's reused positions.
        """

    def planned_ratio(self, layout: ReuseLayout) -> float:
        """Share that this request's reused tokens are planned for, before any signal; by default :attr:`ratio`."""
        return self.ratio

    def num_selected(self, layout: ReuseLayout) -> tuple[int, ...]:
        """Reused tokens computed after each stage; one number where there is one stage, never rising."""
        return (int(self.select(layout).numel()),)

    def shift_strength(self, layout: ReuseLayout) -> float:
        """Strength of the mean shift on the tokens of this request that stay cached, 0 to 1; by default none."""
        return 0.0

    def computed_row_layers(self, layout: ReuseLayout, kept: Sequence[int] | None = None) -> float:
        """Row-layers computed on behalf of the reused tokens, every overhead included, fresh rows apart.

        ``kept`` are the numbers really kept after each stage; by default :meth:`num_selected`.
        """
        return float((kept or self.num_selected(layout))[-1] * layout.num_layers)

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
