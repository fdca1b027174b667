"""Compares two runs of lm-eval sample by sample: scores, texts and log-likelihoods.

``python eval/lm_eval_tasks/compare.py STOCK PLUGIN --out eval/results/lm-eval-crosscheck.json``, where
both are folders that ``lm-eval run --output_path FOLDER --log_samples`` wrote. Ends with 0 if every
sample is equal, with 1 otherwise.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any


def newest(folder: Path, pattern: str) -> Path:
    """The last file of a run; several runs may share a folder."""
    found = sorted(folder.rglob(pattern), key=lambda path: path.stat().st_mtime)
    if not found:
        raise SystemExit(
            f"error: {folder} holds no {pattern}; give --output_path of an lm-eval run"
        )
    return found[-1]


def samples(folder: Path, task: str) -> dict[str, list[Any]]:
    """Raw answers of a task by question: texts, or log-likelihoods with whether they are greedy."""
    lines = newest(folder, f"samples_{task}_*.jsonl").read_text("utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return {record["doc"]["id"]: [answer[0] for answer in record["resps"]] for record in records}


def compare(one: Path, two: Path) -> dict[str, Any]:
    """Scores of both runs, and how many samples are the same."""
    results = [json.loads(newest(f, "results_*.json").read_text("utf-8")) for f in (one, two)]
    tasks = {}
    for task in sorted(results[0]["results"]):
        a, b = samples(one, task), samples(two, task)
        if a.keys() != b.keys():
            raise SystemExit(f"error: {task} was asked other questions in both runs")
        differ = [key for key in a if a[key] != b[key]]
        scores = [
            {k: v for k, v in r["results"][task].items() if isinstance(v, int | float)}
            for r in results
        ]
        tasks[task] = {
            "n": len(a),
            "scores": {"stock": scores[0], "plugin": scores[1]},
            "samples_equal": len(a) - len(differ),
            "largest_log_likelihood_difference": _largest(a, b),
            "different": [{"id": key, "stock": a[key], "plugin": b[key]} for key in differ[:10]],
        }
    return {"equal": all(not task["different"] for task in tasks.values()), "tasks": tasks}


def _largest(a: dict[str, list[Any]], b: dict[str, list[Any]]) -> float | None:
    gaps = [
        abs(float(left[0]) - float(right[0]))
        for key in a
        for left, right in zip(a[key], b[key], strict=True)
        if isinstance(left, list)
    ]
    return max(gaps) if gaps else None


def main() -> int:
    """Compare, print, and write the file under a temporary name first."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stock", type=Path)
    parser.add_argument("plugin", type=Path)
    parser.add_argument("--facts", type=Path, help="JSON object to add: commands, versions, date")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    found = compare(given.stock, given.plugin)
    if given.facts:
        found = json.loads(given.facts.read_text("utf-8")) | found
    text = json.dumps(found, indent=1, ensure_ascii=False) + "\n"
    sys.stdout.write(text)
    if given.out:
        temporary = given.out.with_name(f".{given.out.name}.tmp")
        temporary.write_text(text, "utf-8")
        temporary.replace(given.out)
    return 0 if found["equal"] else 1


if __name__ == "__main__":
    sys.exit(main())
