"""The interface of a policy that asks the model before it chooses: it names a signal, and ranks tokens by its scores."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from torch import Tensor

from chunk_cache.policies.base import Policy
from chunk_cache.policies.layout import ReuseLayout
from chunk_cache.policies.signals.base import Signal


class ScoredPolicy(Policy):
    """Chooses by the scores of a :class:`~chunk_cache.policies.signals.Signal`.

    The engine asks :meth:`needs_signal` first. Where it is False, :meth:`select` answers before layer 0. Else the
    requests of a batch that name equal signals are probed together: the signal runs its passes over the loaded KV and
    calls :meth:`choose` for each request, and the final pass then runs from layer 0 with known rows.

    A policy with a signal of its own defines both in one file. Equal scores are broken by position
    (:func:`~chunk_cache.policies.top_positions`): ranks that are given the same scores choose the same rows.
    """

    @abstractmethod
    def signal(self, layout: ReuseLayout) -> Signal:
        """The signal that this request is scored by."""

    @abstractmethod
    def num_selected(self, layout: ReuseLayout) -> tuple[int, ...]:
        """Reused tokens left after each stage of the choice: what the budget pays for beside the signal."""

    @abstractmethod
    def choose(
        self, layout: ReuseLayout, scores: Tensor, candidates: Tensor, stage: int = 0
    ) -> Tensor:
        """Positions of the reused tokens to compute from here on.

        Parameters
        ----------
        layout : ReuseLayout
            The request.
        scores : Tensor
            ``[len(candidates)]``, or what the signal says; the higher, the sooner recomputed.
        candidates : Tensor
            int64, rising: what there is to choose from, all reused positions in the first stage.
        stage : int
            Index into :meth:`num_selected`.

        Returns
        -------
        Tensor
            int64, rising, a subset of the candidates, on the device of the scores.
        """

    def needs_signal(self, layout: ReuseLayout) -> bool:
        """Whether the signal must be computed for this request.

        False where the choice is known without it: the budget leaves no token, or all of them.
        """
        return 0 < self.num_selected(layout)[-1] < layout.num_reused

    def select(self, layout: ReuseLayout) -> Tensor:
        """Positions to compute where no signal is needed; by default none, or all.

        Raises
        ------
        ValueError
            A signal is needed.
        """
        if self.needs_signal(layout):
            raise ValueError(
                f"{self.name} cannot select without a signal here: give scores to choose()."
            )
        return layout.reused_positions()[: self.num_selected(layout)[-1]]

    def computed_row_layers(self, layout: ReuseLayout, kept: Sequence[int] | None = None) -> float:
        """Count the tokens of the last stage through all layers, and the signal's cost where there is one."""
        counts = self.num_selected(layout) if kept is None else kept
        rows = super().computed_row_layers(layout, counts)
        if not self.needs_signal(layout):
            return rows
        return rows + self.signal(layout).cost(layout, counts)
