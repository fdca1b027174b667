"""The numbers of one evaluation run, as the runner makes them and the report shows them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalResult:
    """Numbers of a run; :meth:`to_json` is the fixed JSON of ``rag-pipeline eval``.

    Parameters
    ----------
    dataset, model : str
        As given by the user.
    n : int
        Examples measured.
    modes : dict of str to dict
        Scores by mode, in the order asked for; see ``MEANS`` and ``MEDIANS`` of :mod:`rag_eval.runner.summary`.
    noise_floor : dict
        KL of the same full prefill computed in another batching; ``n`` examples of it.
    significance : dict of str to dict
        By mode, F1 difference to ``full`` and the other paired intervals.
    full_right : dict
        The same scores over the examples that full prefill answers exactly; ``n`` of them.
    retrieval : dict
        Recall and nDCG when the run retrieved by itself.
    """

    dataset: str
    model: str
    n: int
    modes: dict[str, dict[str, Any]]
    noise_floor: dict[str, Any]
    significance: dict[str, dict[str, Any]]
    full_right: dict[str, Any] = field(default_factory=dict)
    retrieval: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """One JSON-ready object."""
        return {
            "dataset": self.dataset,
            "model": self.model,
            "n": self.n,
            "modes": self.modes,
            "noise_floor": self.noise_floor,
            "significance": self.significance,
            "full_right": self.full_right,
            "retrieval": self.retrieval,
        }
