"""The table of a run, for a terminal and for a text file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType

    from rag_eval.result import EvalResult

COLUMNS = (
    ("F1", "f1", "{:.3f}"),
    ("EM", "em", "{:.3f}"),
    ("NLL", "answer_nll", "{:.3f}"),
    ("KL first", "kl_first", "{:.4f}"),
    ("KL answer", "kl_answer", "{:.4f}"),
    ("same answer", "agree_full", "{:.2f}"),
    ("computed", "computed_fraction", "{:.1%}"),
    ("TTFT p50 s", "ttft_p50_s", "{:.3f}"),
    ("CPU p50 s", "ttft_cpu_p50_s", "{:.3f}"),
)


def render_tables(result: EvalResult) -> list[RenderableType]:
    """Make the main table, the noise floor, and the table without what full prefill gets wrong."""
    found: list[RenderableType] = [
        _table(f"{result.dataset} · {result.model} · n = {result.n}", result.modes, result),
        _floor_line(result),
    ]
    # A prompt that fell back was prefilled exactly, which flatters its mode.
    found += [
        f"{scores['fallbacks']} of {result.n} prompts of {name} fell back to ordinary prefill"
        for name, scores in result.modes.items()
        if scores.get("fallbacks")
    ]
    right = result.full_right
    if right.get("n") and right["n"] < result.n:
        title = f"only the {right['n']} questions that full prefill answers exactly"
        found.append(_table(title, right["modes"], None))
    return found


def _table(
    title: str, modes: Mapping[str, Mapping[str, Any]], result: EvalResult | None
) -> RenderableType:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("mode")
    for heading, _, _ in COLUMNS:
        table.add_column(heading, justify="right")
    entries = result.significance.values() if result is not None else ()
    base = next((e["kl_compared_with"] for e in entries if "kl_compared_with" in e), None)
    if result is not None:
        table.add_column("F1 - full [95%]", justify="right", no_wrap=True)
    if base is not None:
        table.add_column(f"KL / {base}", justify="right")
    for name, scores in modes.items():
        cells = [_cell(scores.get(key), form) for _, key, form in COLUMNS]
        if result is not None:
            entry = result.significance.get(name)
            cells.append(_interval(entry))
            if base is not None:
                cells.append(_cell((entry or {}).get("kl_ratio_to_reuse"), "{:.0%}"))
        table.add_row(name, *cells)
    return table


def _cell(value: Any, form: str) -> str:
    return "-" if value is None else form.format(value)


def _interval(entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return "-"
    low, high = entry["ci95"]
    return f"{entry['f1_diff_vs_full']:+.3f} [{low:+.3f}, {high:+.3f}]"


def _floor_line(result: EvalResult) -> str:
    floor = result.noise_floor
    if not floor.get("n"):
        return "noise floor: not measured"
    return (
        f"noise floor (full prefill in another batching, n = {floor['n']}): "
        f"KL first {floor['kl_first']:.5f}, KL answer {floor['kl_answer']:.5f}"
    )
