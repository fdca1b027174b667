"""When each layer was loaded, waited for and computed: to see whether loading hides behind computing."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable
from typing import Any, NamedTuple, Self

_MOST = 10_000
_MARKS = {"load": "=", "wait": ".", "compute": "#"}


class Interval(NamedTuple):
    """What happened to one layer, seconds of :func:`time.perf_counter`."""

    kind: str
    """``load`` (a thread reads it), ``wait`` (a forward waits for it) or ``compute``."""
    layer: int
    began: float
    ended: float
    what: str = ""
    """The record, of a load."""


class Timeline:
    """Intervals of loading and computing, from any thread; the latest 10,000 are kept.

    Nothing is recorded where nobody made one: an engine has one where the setting ``fusion.trace`` says so.
    """

    def __init__(self) -> None:
        self._intervals: deque[Interval] = deque(maxlen=_MOST)
        self._lock = threading.Lock()

    def add(self, kind: str, layer: int, began: float, what: str = "") -> float:
        """Note an interval that ends now; returns now."""
        now = time.perf_counter()
        with self._lock:
            self._intervals.append(Interval(kind, layer, began, now, what))
        return now

    def intervals(self, kind: str = "") -> list[Interval]:
        """Intervals of a kind, or all, by their beginning."""
        with self._lock:
            found = [one for one in self._intervals if kind in ("", one.kind)]
        return sorted(found, key=lambda one: one.began)

    def to_json(self) -> list[list[Any]]:
        """All intervals by their beginning, the fields of each as a list."""
        return [list(one) for one in self.intervals()]

    @classmethod
    def of(cls, intervals: Iterable[Interval]) -> Self:
        """Make one of intervals that another one recorded."""
        made = cls()
        made._intervals.extend(intervals)
        return made

    def clear(self) -> None:
        """Forget all."""
        with self._lock:
            self._intervals.clear()

    def text(self, width: int = 80) -> str:
        """Draw it, one line per layer: ``=`` loading, ``.`` waiting, ``#`` computing (``*``: both at once).

        Parameters
        ----------
        width : int
            Columns of the time axis.

        Returns
        -------
        str
            Lines with a scale below them; empty without intervals.
        """
        rows = self.intervals()
        if not rows:
            return ""
        first = rows[0].began
        span = max(max(one.ended for one in rows) - first, 1e-9)
        lines = []
        for layer in sorted({one.layer for one in rows}):
            cells = [" "] * width
            for one in (one for one in rows if one.layer == layer):
                start = int((one.began - first) / span * (width - 1))
                end = int((one.ended - first) / span * (width - 1))
                for at in range(start, end + 1):
                    both = {cells[at], _MARKS[one.kind]} == {"=", "#"}
                    cells[at] = "*" if both else _MARKS[one.kind]
            lines.append(f"{layer:>5} |{''.join(cells)}|")
        scale = f"{'layer':>5} |0{f'{span * 1e3:.1f} ms':>{width - 1}}|"
        return "\n".join([*lines, scale])


def layer_wise_seconds(
    num_layers: int, load_s: float, compute_s: float, preloaded: int = 0
) -> float:
    """Time of a forward whose layers are loaded one after another while it runs, by the paper's timeline.

    ``start_l = max(end_{l-1}, load_done_l)`` and ``end_l = start_l + c`` give the total
    ``max_l [(l + 1 - k)^+ t + (L - l) c]`` (CachedAttention, https://arxiv.org/abs/2403.19708).

    Parameters
    ----------
    num_layers : int
        Layers L.
    load_s, compute_s : float
        Seconds t and c per layer.
    preloaded : int
        Layers k that were loaded before the forward began.
    """
    return max(
        max(layer + 1 - preloaded, 0) * load_s + (num_layers - layer) * compute_s
        for layer in range(num_layers)
    )
