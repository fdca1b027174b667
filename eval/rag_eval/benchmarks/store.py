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
import json
import platform
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from rag_eval.arguments import OneLineParser, parse_config
from rag_eval.benchmarks.store_config import StoreBenchConfig
from rag_eval.benchmarks.store_matching import time_matching
from rag_eval.benchmarks.store_records import time_records


def run(
    config: StoreBenchConfig, progress: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
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
    return {
        "benchmark": "store",
        **time_matching(config, progress),
        **time_records(config, progress),
        "config": dataclasses.asdict(config),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "torch": torch.__version__,
        },
    }


def main(argv: list[str] | None = None) -> int:
    """Command line of the benchmark; progress on stderr, one JSON object or a table on stdout."""
    parser = OneLineParser(
        prog="rag-pipeline bench store", description=(__doc__ or "").splitlines()[0]
    )
    config, as_json = parse_config(parser, StoreBenchConfig, argv)
    report = run(config, lambda line: print(line, file=sys.stderr))
    if as_json:
        print(json.dumps(report))
        return 0
    for name, value in report.items():
        if isinstance(value, dict) and "wall_ms_p50" in value:
            print(
                f"{name:20} median {value['wall_ms_p50']:9.4f} ms   p99 {value['wall_ms_p99']:9.4f}"
                f"   max {value['wall_ms_max']:9.4f}   CPU {value['cpu_ms_p50']:9.4f}"
                f" p99 {value['cpu_ms_p99']:9.4f}"
                f"   n={value['n']}"
            )
    print(f"index {report['index']}")
    print(f"one record {report['record_bytes']} bytes, torch threads {report['threads']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
