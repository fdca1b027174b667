"""Loading hidden behind computing: an engine's time to first token against the timeline of the CachedAttention paper.

Run with ``python -m rag_eval.benchmarks.overlap --json``. Real engines, one per number k of preloaded layers
(``fusion.preload_layers``), serve a prompt whose chunks lie in a folder behind a line of a given bandwidth. Each
request is followed by the same one with all chunks in memory; what that takes, plus what the timeline
``max_l [(l + 1 - k)^+ t + (L - l) c]`` has more than ``L c``, is expected of the former. t, a layer's time to come, is
measured in that very request; c, the time to compute one, with the chunks in memory.

Two times are compared. ``prefill``: from the moment that k layers are there, which is the paper's (they came while an
earlier job ran). ``ttft``: from the request on. The engine is idle here, so nothing hides the first k layers, and k t is
added on both sides.
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
from rag_eval.benchmarks.frame import benchmark_parser, run_benchmark, versions_of
from rag_eval.benchmarks.overlap_config import OverlapConfig
from rag_eval.benchmarks.overlap_trace import COLUMNS, RequestTrace, plot_traces
from rag_eval.benchmarks.tiers_config import TiersConfig
from rag_eval.benchmarks.tiers_engine import TierSession
from rag_eval.benchmarks.tiers_parts import TiersBench
from rag_eval.command import Progress
from rag_eval.errors import EvalError
from rag_eval.throttled_tier import set_bytes_per_s, throttled_tier


class Pair(NamedTuple):
    """A request whose chunks came through the line, and what the timeline makes of it; seconds."""

    ttft_s: float
    expected_ttft_s: float
    prefill_s: float
    expected_prefill_s: float
    memory_s: float
    load_s: float
    compute_s: float


def pair_of(
    tier: RequestTrace, tier_s: float, memory: RequestTrace, memory_s: float, preloaded: int
) -> Pair:
    """Compare a request with the timeline.

    Parameters
    ----------
    tier, memory : RequestTrace
        Of the request with its chunks behind the line, and in memory.
    tier_s, memory_s : float
        Their times to first token.
    preloaded : int
        Layers k.
    """
    num_layers = len({one.layer for one in memory.intervals})
    load_s, compute_s = tier.layer_load_s(num_layers), memory.layer_compute_s(num_layers)
    first = min(preloaded, num_layers)
    more = layer_wise_seconds(num_layers, load_s, compute_s, first) - num_layers * compute_s
    loads = tier.of_kind("load")
    there = max((one.ended for one in loads if one.layer < first), default=loads[0].began)
    return Pair(
        ttft_s=tier_s,
        expected_ttft_s=memory_s + first * load_s + more,
        prefill_s=tier_s - (there - tier.sent),
        expected_prefill_s=memory_s + more,
        memory_s=memory_s,
        load_s=load_s,
        compute_s=compute_s,
    )


class _Engine:
    """An engine with the throttled folder, and the two prompts that take each other's room in its memory."""

    def __init__(self, session: TierSession, prompts: Sequence[Any], mode: Any) -> None:
        self._session, self._prompts, self._mode = session, prompts, mode

    def served(self, turn: int) -> tuple[float, RequestTrace, int]:
        """Serve a prompt; returns the time to its first token, its trace, and how many of its chunks were fetched."""
        inner = self._session.session
        fetched = self._session.count("fetched")
        inner.flush()
        prompt = self._prompts[turn % 2]
        inner.prefill(prompt.prefix_ids)
        sent = time.perf_counter()
        served = inner.serve(prompt, self._mode, max_new_tokens=1)
        ended = time.perf_counter()
        trace = RequestTrace.of(self._session.state(), sent, ended)
        return served.ttft_s, trace, self._session.count("fetched") - fetched


def _measure(
    config: OverlapConfig, bench: TiersBench, folder: Path, tier: str, preloaded: int
) -> tuple[list[Pair], RequestTrace, int]:
    """Pairs with k preloaded layers, the last trace, and how many pairs were left out."""
    prompts = bench.prompts(2)
    settings: dict[str, Any] = {
        "tier": tier,
        "store_dir": str(folder),
        "store_bytes": bench.room(prompts[0]),
        "preload_layers": preloaded,
        "trace": True,
    }
    pairs: list[Pair] = []
    turn = skipped = 0
    last: RequestTrace | None = None
    with bench.engine(tier, **settings) as session:
        engine = _Engine(session, bench.stored(session, prompts), bench.mode)
        while len(pairs) < config.repeats:
            tier_s, trace, came = engine.served(turn)
            memory_s, memory, again = engine.served(turn)
            turn += 1
            if turn == 2:  # the first request of an engine warms it up; c is known from the second
                num_layers = len({one.layer for one in memory.intervals})
                compute_s = memory.layer_compute_s(num_layers)
                files = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
                # The folder holds two records per chunk of two prompts; a prompt asks for one of each.
                layer_bytes = files / 4 / num_layers
                set_bytes_per_s(folder, layer_bytes / (config.load_share * compute_s))
            elif turn > 3:  # nor does the first one count whose line is slow
                if came != config.chunks or again:
                    skipped += 1
                    bench.progress(f"k={preloaded}: left out; {came} and {again} fetched")
                    if skipped > config.repeats + 2:
                        raise EvalError(
                            "the chunks of most requests were not fetched when they should have been; run it on a "
                            "machine that is less busy"
                        )
                    continue
                pairs.append(pair_of(trace, tier_s, memory, memory_s, preloaded))
                last = trace
                told = pairs[-1]
                bench.progress(
                    f"k={preloaded}: {told.ttft_s:.3f} s, expected {told.expected_ttft_s:.3f} s"
                )
    assert last is not None
    return pairs, last, skipped


def run(config: OverlapConfig, progress: Progress) -> dict[str, Any]:
    """Measure.

    Returns
    -------
    dict
        Per k under ``preloaded``: of ``ttft`` and ``prefill`` the medians, measured and expected, and the median and
        quartiles of their ratios; t and c; the trace of the last request, as rows of ``columns`` and drawn.
    """
    found: dict[str, Any] = {}
    shape = TiersConfig(
        model=config.model,
        chunks=config.chunks,
        chunk_tokens=config.chunk_tokens,
        mode=config.mode,
        repeats=config.repeats,
        seed=config.seed,
    )
    interrupted = False
    with tempfile.TemporaryDirectory(prefix="bench-overlap-") as name, throttled_tier() as tier:
        bench = TiersBench(shape, Path(name), progress)
        for k in config.layers_before:
            try:
                pairs, trace, skipped = _measure(config, bench, Path(name) / f"kv{k}", tier, k)
            except KeyboardInterrupt:
                if not found:
                    raise
                interrupted = True
                break
            found[str(k)] = {
                **_compared("ttft", pairs),
                **_compared("prefill", pairs),
                "n": len(pairs),
                "left_out": skipped,
                "memory_s": round(statistics.median(one.memory_s for one in pairs), 4),
                "load_ms": round(statistics.median(one.load_s for one in pairs) * 1e3, 2),
                "compute_ms": round(statistics.median(one.compute_s for one in pairs) * 1e3, 2),
                "trace": trace.rows(),
                "drawn": trace.text(),
            }
    if config.plot:
        plot_traces(
            {f"k = {k}" if k != "0" else "k = 0": row["trace"] for k, row in found.items()},
            Path(config.plot),
        )
    return {
        "preloaded": found,
        "columns": list(COLUMNS),
        "config": asdict(config),
        "threads": os.environ.get("OMP_NUM_THREADS", "default"),
        "cpus": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "versions": versions_of("sglang", "torch", "rag-pipeline"),
        "interrupted": interrupted,
    }


def _compared(name: str, pairs: Sequence[Pair]) -> dict[str, Any]:
    measured = [getattr(one, f"{name}_s") for one in pairs]
    expected = [getattr(one, f"expected_{name}_s") for one in pairs]
    ratios = [one / other for one, other in zip(measured, expected, strict=True)]
    spread = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios
    return {
        f"{name}_s": round(statistics.median(measured), 4),
        f"{name}_expected_s": round(statistics.median(expected), 4),
        f"{name}_ratio": round(statistics.median(ratios), 4),
        f"{name}_spread": [round(spread[0], 4), round(spread[-1], 4)],
    }


def table(report: dict[str, Any]) -> str:
    """The report as text: a line per k and time, and the trace of the first k."""
    lines = ["  k  time      measured  expected  ratio   quartiles        n   t ms   c ms"]
    for k, row in report["preloaded"].items():
        for name in ("prefill", "ttft"):
            low, high = row[f"{name}_spread"]
            lines.append(
                f"{k:>3}  {name:8} {row[f'{name}_s']:8.3f}s {row[f'{name}_expected_s']:8.3f}s "
                f"{row[f'{name}_ratio']:6.3f}   {low:.3f} - {high:.3f} {row['n']:5} "
                f"{row['load_ms']:6.1f} {row['compute_ms']:6.1f}"
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
