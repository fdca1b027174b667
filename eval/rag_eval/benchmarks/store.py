"""Benchmark of the chunk store: find, save, load and evict, without any engine.

``rag-pipeline bench store --json``

What is timed, each call by itself, wall clock and process CPU time:

``match``
    One prompt scanned against the whole index; prompts hold 6-10 stored chunks at random places
    with fresh text between them.
``match_fresh``
    The same with nothing stored in the prompt: what a request pays that reuses nothing.
``match_boiler_plate``, ``match_one_token``
    The bad cases: an opening that a tenth of the chunks share, and one token repeated.
``add``, ``remove``
    One chunk into and out of the index, with the merges and compactions that fall due; the largest
    value is the longest pause.
``save``, ``load``, ``evict``
    KV of one chunk in the shape of SmolLM2-135M unless told otherwise: gathered from a paged pool and
    committed; leased and copied to other slots of the pool; pushed out by the next commit.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import torch

from rag_eval.benchmarks.call_timer import timer_line
from rag_eval.benchmarks.frame import benchmark_parser, keep_measured, run_benchmark, versions_of
from rag_eval.benchmarks.store_config import StoreBenchConfig
from rag_eval.benchmarks.store_matching import time_matching
from rag_eval.benchmarks.store_records import time_records
from rag_eval.command import Progress, no_progress


def run(config: StoreBenchConfig, progress: Progress = no_progress) -> dict[str, Any]:
    """Run the benchmark.

    Parameters
    ----------
    config : StoreBenchConfig
        Sizes.
    progress : callable
        Called with one line of progress at a time.

    Returns
    -------
    dict
        JSON-ready: ``match``, ``match_fresh``, ``match_boiler_plate``, ``match_one_token``, ``add``,
        ``remove``, ``save``, ``load``, ``evict`` (milliseconds), ``index`` (bytes), ``config``,
        ``versions``, ``threads``.
    """
    parts: dict[str, Any] = {}
    with keep_measured(lambda: parts) as end:
        parts |= time_matching(config, progress)
        parts |= time_records(config, progress)
    return {
        "benchmark": "store",
        **parts,
        "config": dataclasses.asdict(config),
        "threads": torch.get_num_threads(),
        "versions": versions_of("python", "numpy", "torch"),
    } | end.report()


def table(report: dict[str, Any]) -> str:
    """The report as text, one line per kind of call."""
    lines = [
        f"{name:20} {timer_line(value)}"
        for name, value in report.items()
        if isinstance(value, dict) and "wall_ms_p50" in value
    ]
    lines.append(f"index {report['index']}")
    # A run that was broken off has no records.
    size = f"one record {report['record_bytes']} bytes, " if "record_bytes" in report else ""
    lines.append(f"{size}torch threads {report['threads']}")
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> int:
    """Run from a shell."""
    parser = benchmark_parser("rag-pipeline bench store", __doc__)
    return run_benchmark(parser, StoreBenchConfig, run, table, words)


if __name__ == "__main__":
    sys.exit(main())
