"""Plots of a run: quality over TTFT, KL over computed fraction, TTFT over prompt length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rag_eval.drawing import drawing, save_png

if TYPE_CHECKING:
    from rag_eval.result import EvalResult

_COLOURS = (
    "#1b6ca8",
    "#d1495b",
    "#2e8b57",
    "#edae49",
    "#7b5ea7",
    "#5c4033",
    "#00798c",
    "#111111",
    "#e07a1f",
    "#8d99ae",
)
_MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*", "<", ">")


def write_plots(
    result: EvalResult, records: Sequence[Mapping[str, Any]], folder: Path
) -> list[Path]:
    """Write the plots that the run has the numbers for, as PNG.

    Parameters
    ----------
    result, records : EvalResult, sequence of mapping
        Summary and records of the run.
    folder : Path
        Where the files go.

    Returns
    -------
    list of Path
        The files written.
    """
    written = []
    with drawing(11) as plt:
        for name, draw in (
            ("kl_over_computed.png", _kl_over_computed),
            ("quality_over_ttft.png", _quality_over_ttft),
            ("ttft_over_prompt.png", _ttft_over_prompt),
        ):
            figure, axes = plt.subplots(figsize=(7.2, 4.6), layout="constrained")
            if draw(axes, result, records):
                save_png(figure, folder / name, dpi=160)
                written.append(folder / name)
            plt.close(figure)
    return written


def _families(result: EvalResult) -> dict[str, list[str]]:
    """Modes by policy, so that the ratios of one policy share a colour and a line."""
    families: dict[str, list[str]] = {}
    for mode in result.modes:
        base = mode.split(":")[0].split("+")[0] + (
            "+" + mode.split("+", 1)[1] if "+" in mode else ""
        )
        families.setdefault(base, []).append(mode)
    return families


def _series(axes: Any, result: EvalResult, x: str, y: str, x_scale: float = 1.0) -> int:
    drawn = 0
    for index, (family, modes) in enumerate(_families(result).items()):
        points = sorted(
            (scores[x] * x_scale, scores[y])
            for scores in (result.modes[mode] for mode in modes)
            if scores.get(x) is not None and scores.get(y) is not None
        )
        if not points:
            continue
        xs, ys = zip(*points, strict=True)
        axes.plot(
            xs,
            ys,
            marker=_MARKERS[index % len(_MARKERS)],
            color=_COLOURS[index % len(_COLOURS)],
            linewidth=1.4 if len(points) > 1 else 0,
            markersize=8,
            label=family,
        )
        drawn += len(points)
    return drawn


def _label(axes: Any, result: EvalResult, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(f"{result.dataset} · {result.model} · n = {result.n}", fontsize=10, loc="left")
    axes.legend(frameon=False)


def _kl_over_computed(axes: Any, result: EvalResult, _: object) -> bool:
    drawn = _series(axes, result, "computed_fraction", "kl_answer", 100.0)
    floor = result.noise_floor.get("kl_answer")
    if floor is not None:
        axes.axhline(floor, color="grey", linestyle=":", linewidth=1, label="noise floor")
    x, y = "computed share of the prompt, all passes charged [%]", "KL to full prefill"
    _label(axes, result, x, f"{y}, mean over answer tokens [nats]")
    axes.set_ylim(bottom=0)
    return drawn > 1


def _quality_over_ttft(axes: Any, result: EvalResult, _: object) -> bool:
    scores = [mode["f1"] for mode in result.modes.values() if mode.get("f1") is not None]
    # F1 says nothing on a model that answers no question; agreement with full prefill still does.
    use_f1 = bool(scores) and max(scores) >= 0.1
    drawn = _series(axes, result, "ttft_p50_s", "f1" if use_f1 else "agree_full")
    y = "token F1" if use_f1 else "share of answers equal to full prefill's"
    _label(axes, result, "time to first token, median [s]", y)
    axes.set_xlim(left=0)
    return drawn > 1


def _ttft_over_prompt(axes: Any, result: EvalResult, records: Sequence[Mapping[str, Any]]) -> bool:
    drawn = 0
    for index, mode in enumerate(result.modes):
        points = [
            (record["prompt_tokens"], record["modes"][mode]["ttft_s"])
            for record in records
            if record["modes"][mode].get("ttft_s") is not None
        ]
        if points:
            xs, ys = zip(*points, strict=True)
            colour = _COLOURS[index % len(_COLOURS)]
            axes.scatter(xs, ys, s=16, alpha=0.7, color=colour, label=mode)
            drawn += len(points)
    _label(axes, result, "prompt [tokens]", "time to first token [s]")
    axes.set_ylim(bottom=0)
    return drawn > 1
