"""The report of an evaluation of memories as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("recall", "evidence_recall", "{:.3f}"),
    ("NLL", "nll", "{:.4f}"),
    ("F1", "f1", "{:.3f}"),
    ("in episode", "in_episode", "{:.2f}"),
    ("peak tokens", "peak_tokens", "{:,}"),
    ("turn s", "turn_s", "{:.3f}"),
    ("turn CPU s", "turn_cpu_s", "{:.3f}"),
    ("plan s", "plan_s", "{:.3f}"),
    ("build tokens", "build_tokens", "{:,}"),
    ("build s", "build_s", "{:.1f}"),
)


def table(report: Mapping[str, Any]) -> str:
    """One line per method, the differences with their intervals, and the scores per category."""
    methods = report["methods"]
    tokens = report["history_tokens"]
    lines = [
        f"{report['dataset']} · {report['model']} · {report['conversations']} conversations of "
        f"{_between(tokens)} tokens · budget {report['budget']} ({_between(report['budget_tokens'])}) · n = {report['n']}",
        *(f"left out: {count} ({reason})" for reason, count in report["left_out"].items()),
        "",
    ]
    if not report["n"]:
        return "\n".join([*lines, "no question was measured under every method yet"])
    heads = [head for head, _, _ in _COLUMNS]
    rows = [
        [name, *(_cell(scores.get(key), form) for _, key, form in _COLUMNS)]
        for name, scores in methods.items()
    ]
    lines += _aligned([["method", *heads], *rows])
    lines += ["", *_differences(methods)]
    categories = list(next(iter(methods.values()))["categories"])
    head = [f"{category}" for category in categories]
    lines += ["", "evidence recall / NLL / F1 per category"]
    lines += _aligned(
        [
            ["method", *head],
            *(
                [name, *(_category(scores["categories"].get(one)) for one in categories)]
                for name, scores in methods.items()
            ),
        ]
    )
    counts = next(iter(methods.values()))["categories"]
    lines.append("n: " + ", ".join(f"{one} {counts[one]['n']}" for one in categories))
    lines += [
        f"{name}: {scores['missed']} prompts without their record, {scores['failed_steps']} steps failed"
        for name, scores in methods.items()
        if scores["missed"] or scores["failed_steps"]
    ]
    return "\n".join(lines)


def _differences(methods: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = []
    for name, scores in methods.items():
        compared = scores["compared"]
        full = compared.get("full")
        if full:
            nll = full["nll"]
            lines.append(
                f"{name} - full: NLL {_interval(nll)} ({nll['relative']:+.1%}), F1 {_interval(full['f1'])}"
            )
        for group in ("best_baseline", "best_cache"):
            lines += [
                f"{name} - {group.replace('_', ' ')} in {score} ({best['method']}): {_interval(best)}, "
                f"{best['ratio']:.2f} times"
                for score, best in compared.get(group, {}).items()
            ]
    return lines


def _interval(found: Mapping[str, Any]) -> str:
    low, high = found["ci95"]
    return f"{found['difference']:+.4f} [{low:+.4f}, {high:+.4f}]"


def _category(scores: Mapping[str, Any] | None) -> str:
    if scores is None:
        return "-"
    return f"{scores['evidence_recall']:.2f} / {scores['nll']:.2f} / {scores['f1']:.2f}"


def _cell(value: Any, form: str) -> str:
    return "-" if value is None else form.format(value)


def _between(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if at == 0 else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
