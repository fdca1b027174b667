"""Plot of ``bench ttft``: time to first token over prompt length, one line per mode."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rag_eval.drawing import drawing, save_png

_COLOURS = ("#1b6ca8", "#d1495b", "#2e8b57", "#edae49", "#7b5ea7", "#5c4033", "#00798c")
_LINES = ("-", "--", ":", "-.")


def plot_ttft(report: Mapping[str, Any], path: Path) -> None:
    """Draw medians with the range of the runs, as PNG.

    Parameters
    ----------
    report : mapping
        JSON of :func:`rag_eval.benchmarks.ttft.run`.
    path : Path
        File to write; its folder is made. Written under a temporary name first.
    """
    points = report["points"]
    # Numbers of chunks that were asked for at every length make lines of their own.
    asked = str(report["config"]["chunks"])
    groups = sorted({point["chunks"] for point in points}) if asked != "auto" else [None]
    with drawing(11) as plt:
        figure, axes = plt.subplots(figsize=(7.2, 4.6), layout="constrained")
        for index, mode in enumerate(points[0]["modes"]):
            for group, chunks in enumerate(groups):
                own = [point for point in points if chunks in (None, point["chunks"])]
                rows = [point["modes"][mode] for point in own]
                middle = [row["ttft_p50_s"] for row in rows]
                axes.errorbar(
                    [point["prompt_tokens"] for point in own],
                    middle,
                    yerr=[
                        [m - row["ttft_min_s"] for m, row in zip(middle, rows, strict=True)],
                        [row["ttft_max_s"] - m for m, row in zip(middle, rows, strict=True)],
                    ],
                    color=_COLOURS[index % len(_COLOURS)],
                    linestyle=_LINES[group % len(_LINES)],
                    marker="o",
                    markersize=5,
                    capsize=3,
                    label=mode if len(groups) == 1 else f"{mode}, {chunks} chunks",
                )
        axes.set_xlabel("prompt [tokens]")
        axes.set_ylabel("time to first token, median and range [s]")
        axes.set_title(
            f"{Path(report['config']['model']).name} · {report['threads']} thread(s) · "
            f"n = {next(iter(points[0]['modes'].values()))['n']}",
            fontsize=10,
            loc="left",
        )
        axes.set_ylim(bottom=0)
        axes.set_xlim(left=0)
        axes.legend(frameon=False)
        save_png(figure, path, dpi=160)
        plt.close(figure)
