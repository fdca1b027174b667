"""From the records of questions to the numbers of a run: means, categories, and paired differences."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rag_eval.conversation.config import FULL, RETRIEVAL, is_episodic
from rag_eval.metrics import paired_bootstrap

Row = Mapping[str, Any]

MEANS = ("evidence_recall", "nll", "f1")
MEDIANS = ("turn_s", "turn_cpu_s", "plan_s", "plan_cpu_s", "prompt_tokens", "tail_tokens")


def summarise(
    rows: Mapping[str, Mapping[str, Row]], builds: Mapping[str, Sequence[Row]]
) -> dict[str, Any]:
    """Aggregate what was measured.

    Parameters
    ----------
    rows : mapping of str to mapping of str to Row
        Records of questions, by method and id of the question.
    builds : mapping of str to sequence of Row
        Records of builds, by method; one per conversation.

    Returns
    -------
    dict
        ``n``, the number of questions that every method with any has; ``methods`` with the numbers of each over those
        same questions, among them ``compared``: paired differences to the full history, to the best method without
        episodes, and to the best one of those that keep a cache, which is all but retrieval.
    """
    measured = [name for name, found in rows.items() if found]
    shared: set[str] = (
        set.intersection(*(set(rows[name]) for name in measured)) if measured else set()
    )
    ids = [one for one in rows[measured[0]] if one in shared] if measured else []
    columns = {name: [rows[name][one] for one in ids] for name in measured}
    if not ids:
        return {"n": 0, "methods": {name: {"n": 0} for name in measured}}
    methods = {
        name: _scores(columns[name], builds[name]) | {"compared": _compared(name, columns)}
        for name in measured
    }
    return {"n": len(ids), "methods": methods}


def _scores(rows: Sequence[Row], builds: Sequence[Row]) -> dict[str, Any]:
    scores: dict[str, Any] = {"n": len(rows)}
    scores |= {name: _mean([row[name] for row in rows]) for name in MEANS}
    scores |= {name: statistics.median(row[name] for row in rows) for name in MEDIANS}
    peaks = [row["peak_tokens"] for row in (*rows, *builds)]
    scores |= {
        "peak_tokens": max(peaks),
        "build_tokens": sum(row["build_tokens"] for row in builds),
        "build_s": sum(row["build_s"] for row in builds),
        "build_cpu_s": sum(row["build_cpu_s"] for row in builds),
        "probe_tokens": sum(row["probe_tokens"] for row in builds),
        "record_tokens": max((row["record_tokens"] for row in builds), default=0),
        "missed": sum(row["missed"] for row in rows),
        "failed_steps": sum(row["failed"] for row in builds),
    }
    known = [row["in_episode"] for row in rows if row.get("in_episode") is not None]
    scores["in_episode"] = _mean(known) if known else None
    categories = sorted({row["category"] for row in rows})
    scores["categories"] = {
        category: {"n": len(own), **{name: _mean([row[name] for row in own]) for name in MEANS}}
        for category in categories
        if (own := [row for row in rows if row["category"] == category])
    }
    return scores


def _compared(name: str, columns: Mapping[str, Sequence[Row]]) -> dict[str, Any]:
    """Paired differences of a method to full history, and to the baseline that is best at each score."""
    found: dict[str, Any] = {}
    if FULL in columns and name != FULL:
        found[FULL] = {
            score: _difference(columns[name], columns[FULL], score) for score in ("nll", "f1")
        }
        full = _mean([row["nll"] for row in columns[FULL]])
        found[FULL]["nll"]["relative"] = _mean([row["nll"] for row in columns[name]]) / full - 1
    if is_episodic(name):
        baselines = [other for other in columns if other != FULL and not is_episodic(other)]
        caches = [other for other in baselines if other != RETRIEVAL]
        for group, others in (("best_baseline", baselines), ("best_cache", caches)):
            if others:
                found[group] = _against_best(columns, name, others)
    return found


def _against_best(
    columns: Mapping[str, Sequence[Row]], name: str, others: Sequence[str]
) -> dict[str, Any]:
    """A method against that of some others which is best at each score."""
    choose: dict[str, Callable[..., str]] = {"evidence_recall": max, "nll": min, "f1": max}
    found = {}
    for score, best_of in choose.items():
        means = {other: _mean([row[score] for row in columns[other]]) for other in others}
        best = best_of(others, key=means.__getitem__)
        ratio = _mean([row[score] for row in columns[name]]) / (means[best] or math.inf)
        difference = _difference(columns[name], columns[best], score)
        found[score] = {"method": best, "ratio": ratio} | difference
    return found


def _difference(own: Sequence[Row], other: Sequence[Row], score: str) -> dict[str, Any]:
    found = paired_bootstrap([row[score] for row in own], [row[score] for row in other])
    return {"difference": found.mean, "ci95": [found.low, found.high]}


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
