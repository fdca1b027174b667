"""Throughput under Poisson arrivals: every mode on one real HTTP server, at rising rates.

The prompts are RAG prompts whose chunks recur by Zipf's law. Chunk KV is computed before anything is
measured, and what that cost is reported. At each rate every mode gets the same prompts at the same
times, with an empty radix tree at the start; a mode that is saturated is not driven further.

``rag-pipeline bench throughput --model smollm2-135m --modes prefix,query:0.15 --json``
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from typing import Any

from rag_eval.arguments import add_engine_option, require_at_least
from rag_eval.benchmarks.frame import benchmark_parser, keep_measured, run_benchmark, versions_of
from rag_eval.benchmarks.throughput_server import ServerUnderTest, reached_server
from rag_eval.benchmarks.workload import WorkloadConfig, make_workload
from rag_eval.command import Progress, no_progress
from rag_eval.errors import EvalError

BASELINE = "prefix"
CAPACITY_SHARES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
"""Rates of ``auto``, as shares of what the baseline would serve one request after the other."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ThroughputConfig:
    """What is measured."""

    model: str = "smollm2-135m"
    """Hub id, folder, GGUF file or packaged name."""
    modes: str = "prefix,query:0.15"
    """As for the evaluation; ``prefix`` (RadixAttention alone) is always there."""
    rates: str = "auto"
    """Arrivals per second, comma between, or ``auto``: a quarter of what the baseline serves one
    request after the other, then twice as many each time."""
    workload: WorkloadConfig = field(default_factory=WorkloadConfig)
    """The prompts."""
    output_tokens: int = 16
    """Tokens of every answer."""
    ttft_bound_s: float | None = None
    """Bound of the goodput, seconds; ``None`` takes three times the baseline's median TTFT on a
    server that is otherwise idle."""
    url: str | None = None
    """A running server to use; one is started otherwise."""
    engine_args: dict[str, Any] = field(default_factory=dict)
    """Arguments of the server that is started."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "output_tokens")
        if self.ttft_bound_s is not None and not 0 < self.ttft_bound_s < float("inf"):
            raise EvalError(f"ttft_bound_s is {self.ttft_bound_s}; allowed: a positive number")
        if self.url and self.engine_args:
            raise EvalError("engine arguments are for a server started here; leave out --url")
        self.given_rates()

    def given_rates(self) -> tuple[float, ...]:
        """Rates asked for, rising; empty for ``auto``."""
        if self.rates == "auto":
            return ()
        try:
            rates = sorted({float(word) for word in self.rates.split(",")})
        except ValueError:
            rates = []
        if not rates or not 0 < rates[0] <= rates[-1] < float("inf"):
            raise EvalError(
                f"rates is {self.rates!r}; give auto, or positive numbers such as 0.5,1,2"
            )
        return tuple(rates)


def run(config: ThroughputConfig, progress: Progress = no_progress) -> dict[str, Any]:
    """Measure, and return the JSON of ``rag-pipeline bench throughput``.

    Returns
    -------
    dict
        ``runs`` (a list, one per mode and rate, see :class:`LoadRun`), ``modes`` (by mode: what a lone
        request does and takes, ``saturated_at``, ``best_goodput_per_s``, and its ratio to the
        baseline's), ``warm`` (cost of computing the chunks), ``ttft_bound_s``, ``threads``,
        ``versions``, ``interrupted``: true where the run was broken off behind its first load.

    Raises
    ------
    RagPipelineError
        One line: a bad setting, no such model or server, a mode that the server does not serve.
    """
    from rag_eval.runner.modes import parse_modes
    from rag_eval.runner.prompts import PromptMaker
    from rag_pipeline.models import resolve_llm

    names = [name.strip() for name in config.modes.split(",") if name.strip()]
    names = names if BASELINE in names else [BASELINE, *names]
    modes = [mode for mode in parse_modes(names) if mode.name != "full"]
    folder = resolve_llm(config.model).path
    workload = make_workload(config.workload, PromptMaker(folder, gold_tokens=1))
    with (
        reached_server(config.url, folder, config.engine_args, progress) as (url, cpu_seconds),
        closing(
            ServerUnderTest(
                url,
                folder,
                workload,
                output_tokens=config.output_tokens,
                seed=config.workload.seed,
                cpu_seconds=cpu_seconds,
                progress=progress,
            )
        ) as server,
    ):
        warm = server.warm()
        alone = {mode.name: server.probe(mode) for mode in modes}
        bound = config.ttft_bound_s or 3 * alone[BASELINE]["ttft_p50_s"]
        threads = server.threads()
        runs: list[dict[str, Any]] = []
        with keep_measured(lambda: runs) as end:
            for one in server.drive(modes, config.given_rates() or _auto(alone[BASELINE]), bound):
                runs.append(one)
    return {
        "config": asdict(config),
        "mean_prompt_tokens": round(workload.mean_prompt_tokens, 1),
        "ttft_bound_s": round(bound, 4),
        "warm": warm,
        "modes": summary(alone, runs),
        "runs": runs,
        "engine": "sglang",
        "threads": threads,
        "cpus": os.cpu_count(),
        "versions": versions_of("sglang", "torch", "rag-pipeline"),
    } | end.report()


def _auto(alone: dict[str, Any]) -> tuple[float, ...]:
    return tuple(round(share / alone["latency_p50_s"], 4) for share in CAPACITY_SHARES)


def summary(alone: dict[str, Any], runs: list[Any]) -> dict[str, Any]:
    """By mode: the lone request, where it saturates, and the best of its rates; None without any."""
    found: dict[str, Any] = {}
    for name, probe in alone.items():
        own = [run for run in runs if run["mode"] == name]
        found[name] = {
            **probe,
            "saturated_at": next((run["rate"] for run in own if run["saturated"]), None),
            "best_goodput_per_s": max((run["goodput_per_s"] for run in own), default=None),
            "best_output_tokens_per_s": max(
                (run["output_tokens_per_s"] for run in own), default=None
            ),
        }
    base = found[BASELINE]["best_goodput_per_s"]
    for row in found.values():
        best = row["best_goodput_per_s"]
        row["goodput_vs_prefix"] = round(best / base, 3) if base and best is not None else None
    return found


def table(report: dict[str, Any]) -> str:
    """The report as text, one line per mode and rate."""
    lines = [
        f"prompts of {report['mean_prompt_tokens']:.0f} tokens, {report['threads']} threads, goodput "
        f"is TTFT within {report['ttft_bound_s']:.2f} s",
        f"{'mode':18} {'rate/s':>8} {'TTFT p50':>9} {'p99 s':>8} {'tokens/s':>9} {'goodput/s':>10} "
        f"{'CPU s':>8}",
    ]
    for row in report["runs"]:
        cpu = f"{row['cpu_s']:8.1f}" if row["cpu_s"] is not None else f"{'-':>8}"
        lines.append(
            f"{row['mode']:18} {row['rate']:8.3f} {row['ttft_p50_s']:9.3f} {row['ttft_p99_s']:8.3f} "
            f"{row['output_tokens_per_s']:9.1f} {row['goodput_per_s']:10.3f} {cpu}"
            f"{'  saturated' if row['saturated'] else ''}"
        )
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> int:
    """Run from a shell."""
    parser = benchmark_parser("rag-pipeline bench throughput", __doc__)
    parser.add_argument(
        "--ttft-bound", dest="ttft_bound_s", type=float, help="seconds; bound of the goodput"
    )
    add_engine_option(parser)
    return run_benchmark(parser, ThroughputConfig, run, table, words)


if __name__ == "__main__":
    sys.exit(main())
