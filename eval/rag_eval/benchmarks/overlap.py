"""Loading hidden behind computing: an engine's time to first token against the timeline of the CachedAttention paper.

Run with ``python -m rag_eval.benchmarks.overlap --json``. A real engine serves prompts whose chunks lie in a folder
behind a line of a given bandwidth; k layers of them came ahead, as they do while an earlier job runs, and do not go
through the line. Each request is followed by the same one with all chunks in memory. What that takes, plus what the
timeline ``T(k) = max_l [(l + 1 - k)^+ t + (L - l) c]`` has more than ``L c``, is expected of the former. t, a layer's time
to come, is measured in that very request; c, the time to compute one, with the chunks in memory. The numbers k take
turns, so that a busy machine hits all alike.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from chunk_cache import layer_wise_seconds
from rag_eval.benchmarks.frame import benchmark_parser, keep_measured, run_benchmark, versions_of
from rag_eval.benchmarks.overlap_config import OverlapConfig
from rag_eval.benchmarks.overlap_trace import COLUMNS, RequestTrace, plot_traces
from rag_eval.benchmarks.tiers_config import TiersConfig
from rag_eval.benchmarks.tiers_engine import TierSession
from rag_eval.benchmarks.tiers_parts import TiersBench
from rag_eval.command import Progress
from rag_eval.errors import EvalError
from rag_eval.throttled_tier import throttle, throttled_tier

_MOST_WAIT_S = 1.0
"""An engine waits 2 s for all layers of a request together, and then does without them."""


class Pair(NamedTuple):
    """A request whose chunks came through the line, and what the timeline makes of it; seconds."""

    ttft_s: float
    expected_s: float
    memory_s: float
    load_s: float
    compute_s: float


def pair_of(
    tier: RequestTrace, tier_s: float, memory: RequestTrace, memory_s: float, ahead: int
) -> Pair:
    """Compare a request with the timeline.

    Parameters
    ----------
    tier, memory : RequestTrace
        Of the request with its chunks behind the line, and in memory.
    tier_s, memory_s : float
        Their times to first token.
    ahead : int
        Layers k that came ahead.
    """
    num_layers = memory.num_layers
    load_s, compute_s = tier.layer_load_s(ahead), memory.layer_compute_s()
    whole = layer_wise_seconds(num_layers, load_s, compute_s, ahead)
    return Pair(tier_s, memory_s + whole - num_layers * compute_s, memory_s, load_s, compute_s)


class _Run(NamedTuple):
    """One request."""

    ttft_s: float
    trace: RequestTrace
    fetched: int
    reused: int


class _Measuring:
    """An engine with the throttled folder, and the two prompts that take each other's room in its memory."""

    def __init__(
        self, config: OverlapConfig, bench: TiersBench, session: TierSession, folder: Path
    ) -> None:
        self._config, self._bench, self._session, self._folder = config, bench, session, folder
        self._prompts = bench.stored(session, bench.prompts(2))
        self._turn = 0
        self._bytes_per_s = 0.0
        self.skipped = 0

    def _served(self) -> _Run:
        inner, prompt = self._session.session, self._prompts[self._turn % 2]
        fetched = self._session.count("fetched")
        inner.flush()
        inner.prefill(prompt.prefix_ids)
        sent = time.perf_counter()
        served = inner.serve(prompt, self._bench.mode, max_new_tokens=1)
        trace = RequestTrace.of(self._session.state(), sent, time.perf_counter())
        came = self._session.count("fetched") - fetched
        return _Run(served.ttft_s, trace, came, served.usage.get("reused_tokens", 0))

    def _both(self) -> tuple[_Run, _Run]:
        """The next prompt, from the folder and from memory."""
        self._turn += 1
        return self._served(), self._served()

    def warm_up(self) -> None:
        """Find out how fast the engine computes, and how slow the line must be for that."""
        self._both()
        _, memory = self._both()
        layers, compute_s = memory.trace.num_layers, memory.trace.layer_compute_s()
        # The folder holds two records per chunk of two prompts; a prompt asks for one of each.
        files = sum(file.stat().st_size for file in self._folder.rglob("*.safetensors"))
        load_s = min(self._config.load_share * compute_s, compute_s + _MOST_WAIT_S / layers)
        self._bytes_per_s = files / 4 / layers / load_s
        throttle(self._folder, self._bytes_per_s)
        self._both()

    def pair(self, ahead: int) -> tuple[Pair, RequestTrace] | None:
        """Measure once with k layers ahead; None where the chunks were not loaded as they should."""
        throttle(self._folder, self._bytes_per_s, ahead)
        tier, memory = self._both()
        if tier.fetched != self._config.chunks or memory.fetched or tier.reused != memory.reused:
            self.skipped += 1
            self._bench.progress(
                f"k={ahead}: left out; {tier[2:]} and {memory[2:]} fetched, reused"
            )
            return None
        found = pair_of(tier.trace, tier.ttft_s, memory.trace, memory.ttft_s, ahead)
        self._bench.progress(f"k={ahead}: {found.ttft_s:.3f} s, expected {found.expected_s:.3f} s")
        return found, tier.trace


def run(config: OverlapConfig, progress: Progress) -> dict[str, Any]:
    """Measure.

    Returns
    -------
    dict
        Per k under ``preloaded``: medians of the time to first token, measured, expected and from memory, the median and
        quartiles of the ratio, t and c, and the trace of the last request, as rows of ``columns`` and drawn.

    Raises
    ------
    EvalError
        Most requests were not served as they should have been.
    """
    shape = TiersConfig(
        model=config.model,
        chunks=config.chunks,
        chunk_tokens=config.chunk_tokens,
        mode=config.mode,
        repeats=config.repeats,
        seed=config.seed,
    )
    pairs: dict[int, list[Pair]] = {k: [] for k in config.layers_ahead}
    traces: dict[int, RequestTrace] = {}
    skipped = 0
    with tempfile.TemporaryDirectory(prefix="bench-overlap-") as name, throttled_tier() as tier:
        folder = Path(name) / "kv"
        bench = TiersBench(shape, Path(name), progress)
        room = bench.room(bench.prompts(2)[0])
        settings: dict[str, Any] = {"tier": tier, "store_dir": str(folder), "trace": True}
        with bench.engine(tier, store_bytes=room, **settings) as session:
            measuring = _Measuring(config, bench, session, folder)
            with keep_measured(lambda: traces) as end:
                measuring.warm_up()
                while any(len(rows) < config.repeats for rows in pairs.values()):
                    for k, rows in pairs.items():
                        found = measuring.pair(k)
                        if found is not None:
                            rows.append(found[0])
                            traces[k] = found[1]
                    if measuring.skipped > (config.repeats + 2) * len(pairs):
                        raise EvalError(
                            "the chunks of most requests did not come as they should have; run it on a machine that "
                            "is less busy"
                        )
            skipped = measuring.skipped
    told = {str(k): _told(rows, traces[k]) for k, rows in pairs.items() if rows}
    if config.plot:
        plot_traces({f"k = {k}": row["trace"] for k, row in told.items()}, Path(config.plot))
    return {
        "preloaded": told,
        "columns": list(COLUMNS),
        "left_out": skipped,
        "config": asdict(config),
        "threads": os.environ.get("OMP_NUM_THREADS", "default"),
        "cpus": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "versions": versions_of("sglang", "torch", "rag-pipeline"),
    } | end.report()


def _told(pairs: Sequence[Pair], trace: RequestTrace) -> dict[str, Any]:
    ratios = [one.ttft_s / one.expected_s for one in pairs]
    spread = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios
    middle = {name: statistics.median(getattr(one, name) for one in pairs) for name in Pair._fields}
    return {
        **{name: round(value, 4) for name, value in middle.items()},
        "ratio": round(statistics.median(ratios), 4),
        "spread": [round(spread[0], 4), round(spread[-1], 4)],
        "n": len(pairs),
        "trace": trace.rows(),
        "drawn": trace.text(),
    }


def table(report: dict[str, Any]) -> str:
    """The report as text: a line per k, and the trace of the first k."""
    lines = ["  k  measured  expected   ratio   quartiles        n   memory    t ms    c ms"]
    for k, row in report["preloaded"].items():
        low, high = row["spread"]
        lines.append(
            f"{k:>3} {row['ttft_s']:8.3f}s {row['expected_s']:8.3f}s {row['ratio']:7.3f}   "
            f"{low:.3f} - {high:.3f} {row['n']:5} {row['memory_s']:7.3f}s "
            f"{row['load_s'] * 1e3:7.1f} {row['compute_s'] * 1e3:7.1f}"
        )
    for k, row in list(report["preloaded"].items())[:1]:
        lines += [f"k = {k}; = loading, . waiting, # computing, * both", *row["drawn"]]
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> int:
    """Run from a shell."""
    parser = benchmark_parser("python -m rag_eval.benchmarks.overlap", __doc__)
    return run_benchmark(parser, OverlapConfig, run, table, words)


if __name__ == "__main__":
    sys.exit(main())
