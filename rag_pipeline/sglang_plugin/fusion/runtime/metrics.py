"""Counters and histograms of fusion, in the registry that SGLang's own ``/metrics`` serves.

SGLang collects its processes through prometheus' multi-process folder; metrics made in the scheduler process
therefore appear there without a route of our own. With metrics off (no ``--enable-metrics``) the same numbers are
kept as plain integers for ``/server_info``.
"""

from __future__ import annotations

import threading
from collections import Counter
from typing import TYPE_CHECKING, Any

from rag_pipeline.protocol import METRIC_PREFIX

if TYPE_CHECKING:
    from chunk_cache import StoreStats

_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_SHARES = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)


class FusionMetrics:
    """Numbers of one scheduler process.

    Parameters
    ----------
    export : bool
        Also publish to prometheus.
    labels : dict, optional
        SGLang's constant labels of this process.
    """

    def __init__(self, *, export: bool = False, labels: dict[str, str] | None = None) -> None:
        self.counts: Counter[str] = Counter()
        self._labels = dict(labels or {})
        self._families: dict[str, Any] = {}
        self._shown: Counter[str] = Counter()
        self._lock = threading.Lock()
        if export:
            self._families = _make_families(tuple(self._labels))

    def count(self, family: str, kind: str, amount: float = 1) -> None:
        """Add to a counter.

        Parameters
        ----------
        family : str
            ``requests``, ``tokens``, ``spans``, ``turns``, ``memories``, ``fallbacks``, ``prefixes``, ``drafts`` or ``background``.
        kind : str
            Value of the label ``kind``.
        amount : float
            Not negative.
        """
        if amount:
            with self._lock:  # the thread that asks shared tiers for turns counts too
                self.counts[f"{family}.{kind}"] += amount  # type: ignore[assignment]
        metric = self._families.get(family)
        if metric is not None and amount:
            metric.labels(**self._labels, kind=kind).inc(amount)

    def observe(self, family: str, seconds: float) -> None:
        """Record a duration: ``match_seconds``, ``plan_seconds``, ``probe_seconds`` or ``forward_seconds``."""
        self.counts[f"{family}.count"] += 1
        self.counts[f"{family}.total_us"] += int(seconds * 1e6)
        metric = self._families.get(family)
        if metric is not None:
            metric.labels(**self._labels).observe(seconds)

    def observe_ratio(self, ratio: float) -> None:
        """Record the share of a prompt's reused tokens that its policy planned to recompute."""
        self.counts["planned_ratio.count"] += 1
        self.counts["planned_ratio.total_ppm"] += round(ratio * 1e6)
        metric = self._families.get("planned_ratio")
        if metric is not None:
            metric.labels(**self._labels).observe(ratio)

    def gauge(self, family: str, value: float) -> None:
        """Set a gauge: ``store_bytes`` or ``store_chunks``."""
        self.counts[family] = int(value)
        metric = self._families.get(family)
        if metric is not None:
            metric.labels(**self._labels).set(value)

    def count_tier(self, tier: str, kind: str, amount: float = 1) -> None:
        """Count an event of a tier, by its name: ``hit``, ``written``, ``dropped`` and so on."""
        self._add_tier("tiers", tier, kind, f"{tier or 'tiers'}.{kind}", amount)

    def tier_moved(self, tier: str, kind: str, num_bytes: int, seconds: float) -> None:
        """Note bytes (as they lie in memory) that came from a tier (``read``) or went there (``written``)."""
        self._add_tier("tier_bytes", tier, kind, f"{tier}.{kind}_bytes", num_bytes)
        self._add_tier("tier_seconds", tier, kind, f"{tier}.{kind}_us", seconds)

    def show_store(self, stats: StoreStats) -> None:
        """Note what the memory tier has done since the last call, and what it holds."""
        done = {
            "hit": stats.hits,
            "miss": stats.misses,
            "stored": stats.inserted,
            "evicted": stats.evicted,
            "no_room": stats.rejected_no_room + stats.rejected_too_big,
            "damaged": stats.corrupt,
        }
        for kind, number in done.items():
            self.count_tier("memory", kind, number - self._shown[kind])
            self._shown[kind] = number
        self.gauge("store_bytes", stats.bytes_now)
        self.gauge("store_chunks", stats.chunks_now)

    def forget(self) -> None:
        """Count from nothing again, with a store that does the same; what was exported stays."""
        self.counts.clear()
        self._shown.clear()

    def tier_queue(self, tier: str, records: int, num_bytes: int) -> None:
        """Set what waits to be written to a tier."""
        for kind, value in (("records", records), ("bytes", num_bytes)):
            self.counts[f"{tier}.queue_{kind}"] = value
            metric = self._families.get("tier_queue")
            if metric is not None:
                metric.labels(**self._labels, tier=tier, kind=kind).set(value)

    def _add_tier(self, family: str, tier: str, kind: str, name: str, amount: float) -> None:
        if not amount:
            return
        with self._lock:  # several threads read, and one per tier writes
            self.counts[name] += int(amount * 1e6) if family == "tier_seconds" else int(amount)
        metric = self._families.get(family)
        if metric is not None:
            metric.labels(**self._labels, tier=tier, kind=kind).inc(amount)

    def to_json(self) -> dict[str, int]:
        """Return all numbers as a JSON-ready dict."""
        return {key: int(value) for key, value in sorted(dict(self.counts).items())}


def _make_families(names: tuple[str, ...]) -> dict[str, Any]:
    # Imported late: prometheus reads its multi-process folder from the environment at import.
    from prometheus_client import Counter as Count
    from prometheus_client import Gauge, Histogram

    def counter(name: str, text: str, *more: str) -> Any:
        return Count(f"{METRIC_PREFIX}{name}", text, [*names, *more, "kind"])

    def histogram(name: str, text: str, buckets: tuple[float, ...] = _SECONDS) -> Any:
        return Histogram(f"{METRIC_PREFIX}{name}", text, [*names], buckets=buckets)

    def gauge(name: str, text: str, *more: str) -> Any:
        labels = [*names, *more]
        return Gauge(f"{METRIC_PREFIX}{name}", text, labels, multiprocess_mode="mostrecent")

    return {
        "requests": counter("requests", "Requests by outcome."),
        "tokens": counter("tokens", "Prompt tokens by what happened to them."),
        "spans": counter("spans", "Chunk look-ups by outcome."),
        "turns": counter("turns", "Turns of conversations by event, and tokens loaded from them."),
        "memories": counter("memories", "Memory records by event, and slots loaded from them."),
        "fallbacks": counter("fallbacks", "Prompts or chunks prefilled as usual, by reason."),
        "prefixes": counter(
            "prefixes", "Prompts of attention methods whose KV no later prompt finds, by reason."
        ),
        "drafts": counter("drafts", "Drafts of an answer that scored tokens, and those left out."),
        "background": counter("background", "Background chunk builds by event."),
        "tiers": counter("tiers", "Chunk records, by tier and event.", "tier"),
        "tier_bytes": counter("tier_bytes", "Chunk KV read from and written to a tier.", "tier"),
        "tier_seconds": counter("tier_seconds", "Time that took, in background threads.", "tier"),
        "tier_queue": gauge("tier_queue", "What waits to be written to a tier.", "tier", "kind"),
        "match_seconds": histogram("match_seconds", "Matching and leasing for one request."),
        "plan_seconds": histogram("plan_seconds", "Planning the rows of one fused forward."),
        "probe_seconds": histogram("probe_seconds", "Probing passes of one fused forward."),
        "forward_seconds": histogram("forward_seconds", "One fused forward, passes included."),
        "planned_ratio": histogram(
            "planned_ratio",
            "Share of a prompt's reused tokens to be recomputed, as planned.",
            _SHARES,
        ),
        "store_bytes": gauge("store_bytes", "Bytes of chunk KV held in memory."),
        "store_chunks": gauge("store_chunks", "Chunks held in memory."),
    }
