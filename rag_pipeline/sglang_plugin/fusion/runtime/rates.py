"""How fast this rank computes and loads, measured while it serves: what the loading controller goes by.

CacheBlend (https://arxiv.org/abs/2405.16444, section 5.1) profiles prefill offline and takes a device's throughput from
its data sheet. Here both are measured on the work itself, so that they follow a network that slows down and a GPU that
is shared.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

MEMORY = "memory"
"""Name of the memory tier: reading there and rotating into the pool."""
LEAST_ROWS = 16
"""A forward of fewer rows says how long a forward takes at least, not how fast rows are computed."""
_EVIDENCE = 16
"""Measurements (forwards, layers) before a rate counts."""
_LONG_AGO = 256
"""A rate follows the latest measurements, about so many."""
_CHEAP_S = 0.05
"""Loading a chunk is never refused when it takes no longer: the measurement is no better, and the gain is small."""
_TRY_ANYWAY = 32
"""Each time that so many were refused, or taken from a farther tier, one is not: the rates may be out of date."""


class RunningRate:
    """Amount per second over many measurements, which forgets slowly."""

    __slots__ = ("_amount", "_seconds", "count")

    def __init__(self) -> None:
        self._amount = self._seconds = 0.0
        self.count = 0

    def add(self, amount: float, seconds: float) -> None:
        """Count one measurement; large ones weigh more."""
        keep = 1.0 - 1.0 / _LONG_AGO
        self._amount = keep * self._amount + amount
        self._seconds = keep * self._seconds + max(seconds, 0.0)
        self.count += 1

    @property
    def unit_s(self) -> float | None:
        """Seconds per unit; ``None`` before there is evidence."""
        return self._seconds / self._amount if self.count >= _EVIDENCE and self._amount else None


class Rates:
    """Compute rate of one rank and bandwidth of each tier. Thread-safe.

    Compute is rows per second of forwards that extend prompts, without the time in which they load or wait. A
    forward's fixed cost counts as its rows', so small batches look slow. Bandwidth is of one reading thread, in bytes
    as they lie in memory: decoding counts as loading. Numbers of ranks differ; what decides a shape is agreed on
    (:func:`~.admission.costs.agree`).
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._compute = RunningRate()
        self._tiers: dict[str, RunningRate] = {}
        self._refusals: dict[str, int] = {}

    # -- measurements -------------------------------------------------------------------------

    def note_forward(self, rows: int, seconds: float) -> None:
        """Count a forward that extended prompts; one of few rows is left out."""
        if rows >= LEAST_ROWS:
            with self._lock:
                self._compute.add(rows, seconds)

    def note_load(self, tier: str, num_bytes: int, seconds: float) -> None:
        """Count a layer that was read from a tier, or (:data:`MEMORY`) from memory into the pool."""
        with self._lock:
            self._tiers.setdefault(tier, RunningRate()).add(num_bytes, seconds)

    # -- what they say ------------------------------------------------------------------------

    @property
    def row_s(self) -> float | None:
        """Seconds to compute a row; ``None`` before there is evidence."""
        with self._lock:
            return self._compute.unit_s

    def load_s(self, tier: str, num_bytes: int) -> float | None:
        """Seconds in which one thread loads so much from a tier; ``None`` before there is evidence."""
        if not num_bytes:
            return 0.0
        with self._lock:
            rate = self._tiers.get(tier)
            unit_s = None if rate is None else rate.unit_s
        return None if unit_s is None else num_bytes * unit_s

    def is_worth_loading(
        self, tier: str, num_bytes: int, num_tokens: int, parallel: int = 1
    ) -> bool:
        """Whether loading a chunk takes no longer than computing it; true before there is evidence.

        Parameters
        ----------
        tier : str
            Where it lies.
        num_bytes, num_tokens : int
            Its size in memory.
        parallel : int
            Threads that read such chunks at once.
        """
        load_s, row_s = self.load_s(tier, num_bytes), self.row_s
        if load_s is None or row_s is None:
            return True
        load_s /= max(1, parallel)
        if load_s <= max(_CHEAP_S, num_tokens * row_s):
            return True
        return self._try_anyway(tier)

    def by_cost(self, tiers: Sequence[str]) -> list[str]:
        """Tiers in the order in which to look: the fastest first where all are known, else as given."""
        units = [self.load_s(tier, 1) for tier in tiers]
        known = [unit for unit in units if unit is not None]
        if len(tiers) < 2 or len(known) < len(units) or known == sorted(known):
            return list(tiers)
        if self._try_anyway(",".join(tiers)):
            return list(tiers)
        return [tier for _, _, tier in sorted(zip(known, range(len(tiers)), tiers, strict=True))]

    def _try_anyway(self, what: str) -> bool:
        with self._lock:
            refused = self._refusals[what] = (self._refusals.get(what, 0) + 1) % _TRY_ANYWAY
        return not refused

    def to_json(self) -> dict[str, Any]:
        """Rates with evidence: rows per second, bytes per second by tier."""
        with self._lock:
            row_s = self._compute.unit_s
            loads = {name: rate.unit_s for name, rate in self._tiers.items()}
        return {
            "rows_per_s": round(1.0 / row_s, 1) if row_s else None,
            "bytes_per_s": {name: round(1.0 / s) for name, s in sorted(loads.items()) if s},
        }
