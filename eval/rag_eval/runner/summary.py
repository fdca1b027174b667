"""From the records of examples to the numbers of a run."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rag_eval.metrics import paired_bootstrap
from rag_eval.result import EvalResult
from rag_eval.runner.modes import yardstick

MEANS = (
    "f1",
    "em",
    "rouge_l",
    "answer_nll",
    "kl_first",
    "kl_answer",
    "agree_full",
    "computed_fraction",
    "reused_tokens",
)
"""Averaged over examples."""
MEDIANS = {"ttft_p50_s": "ttft_s", "ttft_cpu_p50_s": "ttft_cpu_s"}
"""Medians over examples, by the field of a record they come from."""
COUNTS = ("fallbacks",)


def summarise(
    records: Sequence[Mapping[str, Any]],
    modes: Sequence[str],
    *,
    dataset: str,
    model: str,
    seed: int,
    retrieval: dict[str, Any] | None = None,
) -> EvalResult:
    """Aggregate records; every mode is taken over the same examples."""
    right = [record for record in records if record["modes"]["full"]["em"] == 1.0]
    floors = [record["noise_floor"] for record in records if record.get("noise_floor")]
    return EvalResult(
        dataset=dataset,
        model=model,
        n=len(records),
        modes={mode: _scores(records, mode) for mode in modes},
        noise_floor={
            "kl_first": _mean([floor["kl_first"] for floor in floors]),
            "kl_answer": _mean([floor["kl_answer"] for floor in floors]),
            "kl_answer_max": max((floor["kl_answer"] for floor in floors), default=None),
            "answer_nll_abs": _mean([floor["answer_nll_abs"] for floor in floors]),
            "agree_full": _mean([floor["agree_full"] for floor in floors]),
            "n": len(floors),
        },
        significance={
            mode: _significance(records, mode, seed) for mode in modes if mode != "full" and records
        },
        full_right={"n": len(right), "modes": {mode: _scores(right, mode) for mode in modes}}
        if right
        else {"n": 0, "modes": {}},
        retrieval=retrieval or {},
    )


def _scores(records: Sequence[Mapping[str, Any]], mode: str) -> dict[str, Any]:
    rows = [record["modes"][mode] for record in records]
    scores: dict[str, Any] = {name: _mean([row.get(name) for row in rows]) for name in MEANS}
    for name, source in MEDIANS.items():
        values = [row[source] for row in rows if row.get(source) is not None]
        scores[name] = statistics.median(values) if values else None
    for name in COUNTS:
        scores[name] = sum(bool(row.get("fallback")) for row in rows)
    for name in ("kl_first", "kl_answer", "f1"):
        scores[f"{name}_se"] = _standard_error([row.get(name) for row in rows])
    return scores


def _significance(records: Sequence[Mapping[str, Any]], mode: str, seed: int) -> dict[str, Any]:
    def column(name: str, of: str) -> list[float]:
        return [float(record["modes"][of][name]) for record in records]

    f1 = paired_bootstrap(column("f1", mode), column("f1", "full"), seed=seed)
    nll = paired_bootstrap(column("answer_nll", mode), column("answer_nll", "full"), seed=seed)
    found: dict[str, Any] = {
        "f1_diff_vs_full": f1.mean,
        "ci95": [f1.low, f1.high],
        "nll_diff_vs_full": nll.mean,
        "nll_ci95": [nll.low, nll.high],
        "n": f1.n,
    }
    base_mode = yardstick(records[0]["modes"]) if records else None
    if base_mode is not None and mode != base_mode:
        kl = paired_bootstrap(column("kl_answer", mode), column("kl_answer", base_mode), seed=seed)
        base = sum(column("kl_answer", base_mode))
        found |= {
            "kl_compared_with": base_mode,
            "kl_diff_vs_reuse": kl.mean,
            "kl_diff_ci95": [kl.low, kl.high],
            "kl_ratio_to_reuse": sum(column("kl_answer", mode)) / base if base > 0 else None,
        }
    return found


def _mean(values: Sequence[float | None]) -> float | None:
    known = [float(value) for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def _standard_error(values: Sequence[float | None]) -> float | None:
    known = [float(value) for value in values if value is not None]
    return statistics.stdev(known) / math.sqrt(len(known)) if len(known) > 1 else None
