"""From distances and scores to pass or fail, one policy at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rag_eval.gate.exactness import Distance, Exactness
from rag_eval.gate.thresholds import Thresholds
from rag_eval.runner.modes import PLAIN_REUSE, Mode

PROMISES = {
    "no spans": "a request without fusion fields is plain prefill",
    "off": "a request that opts out is plain prefill, with chunks stored",
    "own place": "a chunk at the position it was computed at is plain prefill, unrotated",
    "ratio 1": "everything recomputed through the fused path is plain prefill",
    "isolation": "an exact request behind a fused one is untouched",
}
"""What each exactness check means."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One judged number.

    Parameters
    ----------
    name : str
        Check, a key of ``PROMISES`` or a score of the fidelity run.
    policy : str
        Mode it belongs to; empty for what every policy needs.
    passed : bool
        The verdict.
    value, limit : float or None
        The number and its limit; ``None`` where there is nothing to measure.
    detail : str
        Why it failed, or what makes it pass although the number looks odd.
    """

    name: str
    policy: str
    passed: bool
    value: float | None
    limit: float | None
    detail: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON types; a value that is no number is ``None``."""
        return asdict(self) | {"value": finite(self.value), "limit": finite(self.limit)}


def finite(value: float | None) -> float | None:
    """`value`, or ``None`` where JSON has no form for it."""
    return value if value is not None and math.isfinite(value) else None


def largest(values: Iterable[float]) -> float:
    """Largest value, 0 of none; nan as soon as one is nan, which ``max`` may lose."""
    found = list(values)
    return math.nan if any(math.isnan(value) for value in found) else max(found, default=0.0)


def mean_kl(distances: Sequence[Distance]) -> float:
    """Mean over requests of the mean over tokens, nats; 0 of none."""
    return math.fsum(d.kl for d in distances) / len(distances) if distances else 0.0


def judge_exactness(found: Exactness, modes: Sequence[Mode], limits: Thresholds) -> list[Check]:
    """Judge every exactness check; a check that could not be made is failed."""
    limit = limits.exact_kl(mean_kl(found.floor), fp32=found.fp32)
    # Two tokens whose log-probabilities re-batching alone may swap are a tie.
    tie = limits.tie(largest(d.log_prob for d in found.floor), limit)
    checks = [
        _exact(name, mode, distances, limit, tie)
        for (name, mode), distances in found.checks.items()
        if mode not in found.unavailable
    ]
    known = {"", *(mode.name for mode in modes)}
    checks += [
        Check(name="served", policy=mode, passed=False, value=None, limit=None, detail=reason)
        for mode, reason in found.unavailable.items()
        if mode in known
    ]
    return checks


def _exact(name: str, mode: str, distances: Sequence[Distance], limit: float, tie: float) -> Check:
    # The mean over prompts and tokens: the largest of a few distances scatters far more.
    kl = mean_kl(distances)
    lead = largest(d.lead for d in distances)
    faults = [d.fault for d in distances if d.fault]
    # Written so that nan fails.
    if not kl <= limit:
        faults.append(f"KL {kl:.2g} is above the noise")
    if not lead <= tie:
        faults.append(f"greedy tokens differ, by {lead:.2g} nats in plain prefill")
    note = "" if lead <= 0 else f"a tie of {lead:.2g} nats fell the other way"
    return Check(
        name=name,
        policy=mode,
        passed=not faults,
        value=kl,
        limit=limit,
        detail="; ".join(faults) or note,
    )


def judge_fidelity(
    scores: Mapping[str, Mapping[str, Any]],
    modes: Sequence[Mode],
    limits: Thresholds,
    *,
    exact_kl: float,
) -> list[Check]:
    """Judge the scores of a short run.

    Parameters
    ----------
    scores : mapping of str to mapping
        ``EvalResult.modes``: by mode, with ``full`` and plain reuse among them.
    modes : sequence of Mode
        Modes to judge.
    limits : Thresholds
        Thresholds.
    exact_kl : float
        KL below which a mode is as good as exact, nats.
    """
    checks: list[Check] = []
    full, reuse = scores["full"], scores[PLAIN_REUSE]
    for mode in modes:
        row = scores[mode.name]
        if mode.policy != "reuse":
            checks.append(_kl_of_reuse(mode.name, row, reuse, limits, exact_kl))
        agreement = row["agree_full"]
        drop = full["f1"] - row["f1"]
        checks += [
            Check(
                name="agreement",
                policy=mode.name,
                passed=agreement >= limits.min_agreement,
                value=agreement,
                limit=limits.min_agreement,
            ),
            Check(
                name="f1 drop",
                policy=mode.name,
                passed=drop <= limits.max_f1_drop,
                value=drop,
                limit=limits.max_f1_drop,
                detail="" if full["f1"] > 0 else "full prefill answers nothing right: says nothing",
            ),
            Check(
                name="fallbacks",
                policy=mode.name,
                passed=row["fallbacks"] == 0,
                value=float(row["fallbacks"]),
                limit=0.0,
            ),
        ]
    return checks


def _kl_of_reuse(
    name: str,
    row: Mapping[str, Any],
    reuse: Mapping[str, Any],
    limits: Thresholds,
    exact_kl: float,
) -> Check:
    kl, base = row["kl_answer"], reuse["kl_answer"]
    at_floor = kl <= exact_kl
    return Check(
        name="KL / reuse",
        policy=name,
        passed=at_floor or kl <= limits.max_kl_of_reuse * base,
        value=kl / base if base > 0 else None,
        limit=limits.max_kl_of_reuse,
        detail="within the noise of full prefill" if at_floor else "",
    )


def notes(scores: Mapping[str, Mapping[str, Any]], *, exact_kl: float) -> list[str]:
    """What the checks cannot say about this model, one line each.

    Parameters
    ----------
    scores : mapping of str to mapping
        ``EvalResult.modes``, with ``full`` and plain reuse among them.
    exact_kl : float
        KL below which a mode is as good as exact, nats.
    """
    found = []
    if scores["full"]["f1"] <= 0:
        found.append(
            "full prefill finds none of the planted facts, as with random weights: F1, agreement and the gain over "
            "reuse say nothing about answers here; the exactness checks hold as ever"
        )
    reuse = scores[PLAIN_REUSE]["kl_answer"]
    if reuse <= exact_kl:
        found.append(
            f"reuse without recomputation is within the noise too (KL {reuse:.2g}): a wrong key would not have been "
            "seen, so the exactness checks prove nothing here"
        )
    return found


def verdicts(checks: Sequence[Check], modes: Sequence[Mode]) -> dict[str, dict[str, Any]]:
    """By mode: ``passed``, and in ``failed`` the names of the checks that say no.

    A policy passes when its own checks and those that every policy needs have passed.
    """
    shared = [check.name for check in checks if not check.passed and not check.policy]
    found = {}
    for mode in modes:
        own = [check.name for check in checks if not check.passed and check.policy == mode.name]
        measured = any(check.policy == mode.name for check in checks)
        failed = [*shared, *own] if measured else [*shared, "not measured"]
        found[mode.name] = {"passed": not failed, "failed": failed}
    return found
