"""Curves of ``conversation_growth``: bars for a terminal, and a PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rag_eval.drawing import drawing, save_png

_COLOURS = ("#1b6ca8", "#d1495b", "#2e8b57", "#edae49", "#7b5ea7", "#5c4033", "#00798c")
_WIDTH = 56


def bars(points: Sequence[Mapping[str, Any]], key: str, title: str) -> list[str]:
    """A value per method and length as bars of text, the longest of which fills the line."""
    most = max((point[key] for point in points), default=0) or 1
    return [
        title,
        *(
            f"  {point['method']:<12} {point['history_tokens']:>8,} "
            f"{'#' * max(1, round(_WIDTH * point[key] / most))} {point[key]:,}"
            for point in points
        ),
    ]


def plot_growth(points: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Draw both curves over the length of the history, as PNG.

    Parameters
    ----------
    points : sequence of mapping
        As :func:`rag_eval.benchmarks.conversation_growth.run` returns them.
    path : Path
        File to write; its folder is made. Written under a temporary name first.
    title : str
        Of the figure.
    """
    methods = list(dict.fromkeys(point["method"] for point in points))
    with drawing(10) as plt:
        figure, panes = plt.subplots(1, 2, figsize=(9.2, 4.0), layout="constrained")
        for axes, key, label in zip(
            panes,
            ("turn_s", "peak_tokens"),
            ("time to first token of a turn, median [s]", "tokens in the pool, high-water"),
            strict=True,
        ):
            for index, method in enumerate(methods):
                own = [point for point in points if point["method"] == method]
                axes.plot(
                    [point["history_tokens"] for point in own],
                    [point[key] for point in own],
                    marker="o",
                    markersize=5,
                    color=_COLOURS[index % len(_COLOURS)],
                    label=method,
                )
            axes.set_xlabel("history [tokens]")
            axes.set_ylabel(label)
            axes.set_xlim(left=0)
            axes.set_ylim(bottom=0)
        panes[0].legend(frameon=False)
        panes[0].set_title(title, fontsize=10, loc="left")
        save_png(figure, path, dpi=130)
        plt.close(figure)
