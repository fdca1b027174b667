"""One request's trace: when each layer was loaded, waited for and computed, as rows, as text and as a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from chunk_cache import Interval, Timeline
from rag_eval.drawing import drawing, save_png

COLUMNS = ("load_start", "load_end", "wait_start", "compute_start", "compute_end")
"""Of a row of a trace, milliseconds since the request was sent; loads are null where all came from memory."""


class RequestTrace(NamedTuple):
    """What an engine recorded between two moments of :func:`time.perf_counter`."""

    sent: float
    intervals: list[Interval]

    @classmethod
    def of(cls, state: Mapping[str, Any], sent: float, ended: float) -> RequestTrace:
        """Take what began in between from an engine's state; its clock is the machine's.

        Parameters
        ----------
        state : mapping
            What the engine says of fusion, with ``fusion.trace``.
        sent, ended : float
            When the request was sent, and answered.
        """
        rows = [Interval(*row) for row in state["trace"]]
        return cls(sent, [one for one in rows if sent <= one.began <= ended])

    def of_kind(self, kind: str) -> list[Interval]:
        """Intervals of a kind, by their beginning."""
        return [one for one in self.intervals if one.kind == kind]

    @property
    def num_layers(self) -> int:
        """Layers that were computed."""
        return len(self.of_kind("compute"))

    def layer_load_s(self, ahead: int = 0) -> float:
        """Seconds that a layer of all chunks takes to come, those left out that came ahead."""
        loads = [one for one in self.of_kind("load") if one.layer >= ahead]
        if not loads:
            return 0.0
        num_layers = len({one.layer for one in loads})
        return (max(one.ended for one in loads) - min(one.began for one in loads)) / num_layers

    def layer_compute_s(self) -> float:
        """Seconds that a layer takes that is there already: writing it into the pool, and computing."""
        both = [*self.of_kind("wait"), *self.of_kind("compute")]
        return sum(one.ended - one.began for one in both) / self.num_layers

    def rows(self) -> list[list[float | None]]:
        """Rows of :data:`COLUMNS`, layer by layer, in milliseconds."""
        found = []
        for layer in sorted({one.layer for one in self.intervals}):
            own = [one for one in self.intervals if one.layer == layer]
            loads, waits, computed = (
                [one for one in own if one.kind == kind] for kind in ("load", "wait", "compute")
            )
            times = (
                min((one.began for one in loads), default=None),
                max((one.ended for one in loads), default=None),
                *(row[0].began if row else None for row in (waits, computed)),
                computed[0].ended if computed else None,
            )
            found.append([None if t is None else round((t - self.sent) * 1e3, 2) for t in times])
        return found

    def text(self) -> list[str]:
        """The trace drawn, line by line (:meth:`chunk_cache.Timeline.text`)."""
        return Timeline.of(self.intervals).text().splitlines()


def plot_traces(traces: Mapping[str, Sequence[Sequence[float | None]]], path: Path) -> None:
    """Draw traces beside each other, one bar per layer and kind, as PNG.

    Parameters
    ----------
    traces : mapping
        Rows of :data:`COLUMNS` by title.
    path : Path
        File to write; its folder is made. Written under a temporary name first.
    """
    with drawing(10) as plt:
        figure, panes = plt.subplots(
            1, len(traces), figsize=(4.2 * len(traces), 4.4), layout="constrained", sharey=True
        )
        for axes, (title, rows) in zip(
            [panes] if len(traces) == 1 else panes, traces.items(), strict=True
        ):
            for layer, (load, loaded, wait, begin, end) in enumerate(rows):
                for start, stop, place, colour, label in (
                    (load, loaded, 0.0, "#1b6ca8", "loading"),
                    (wait, begin, 0.4, "#d0d0d0", "waiting, writing into the pool"),
                    (begin, end, 0.4, "#d1495b", "computing"),
                ):
                    if start is not None and stop is not None:
                        axes.barh(
                            layer + place, stop - start, 0.4, start, color=colour, align="edge",
                            label="" if layer else label,
                        )  # fmt: skip
            axes.set_title(title, fontsize=10, loc="left")
            axes.set_xlabel("since the request was sent [ms]")
            axes.set_xlim(left=0)
        first = figure.axes[0]
        first.set_ylabel("layer")
        first.invert_yaxis()
        first.legend(frameon=False, loc="lower left", fontsize=8)
        save_png(figure, path, dpi=130)
        plt.close(figure)
