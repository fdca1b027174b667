"""Throughput under Poisson arrivals: every mode on one real HTTP server, at rising rates.

The prompts are RAG prompts whose chunks recur by Zipf's law. Chunk KV is computed before anything is
measured, and what that cost is reported. At each rate every mode gets the same prompts at the same
times, with an empty radix tree at the start; a mode that is saturated is not driven further.

``rag-pipeline bench throughput --model smollm2-135m --modes prefix,query:0.15 --json``
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

from rag_eval.arguments import INTERRUPTED, OneLineParser, engine_arguments
from rag_eval.benchmarks.throughput_server import ServerUnderTest, reached_server
from rag_eval.benchmarks.workload import WorkloadConfig, make_workload
from rag_eval.errors import EvalError

BASELINE = "prefix"
CAPACITY_SHARES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
"""Rates of ``auto``, as shares of what the baseline would serve one request after the other."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ThroughputConfig:
    """What is measured.

    Parameters
    ----------
    model : str
        Hub id, folder, GGUF file or packaged name.
    modes : str
        As for the evaluation; ``prefix`` (RadixAttention alone) is always there.
    rates : str
        Arrivals per second, comma between, or ``auto``: a quarter of what the baseline serves one
        request after the other, then twice as many each time.
    workload : WorkloadConfig
        The prompts.
    output_tokens : int
        Tokens of every answer.
    ttft_bound_s : float or None
        Bound of the goodput, seconds; ``None`` takes three times the baseline's median TTFT on a
        server that is otherwise idle.
    url : str or None
        A running server to use; one is started otherwise.
    engine_args : dict
        Arguments of the server that is started.
    """

    model: str = "smollm2-135m"
    modes: str = "prefix,query:0.15"
    rates: str = "auto"
    workload: WorkloadConfig = field(default_factory=WorkloadConfig)
    output_tokens: int = 16
    ttft_bound_s: float | None = None
    url: str | None = None
    engine_args: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.output_tokens < 1:
            raise EvalError(f"output_tokens is {self.output_tokens}; it must be at least 1")
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


def run(
    config: ThroughputConfig, progress: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
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
        interrupted = False
        try:
            for one in server.drive(modes, config.given_rates() or _auto(alone[BASELINE]), bound):
                runs.append(one)
        except KeyboardInterrupt:
            if not runs:
                raise
            interrupted = True
    return {
        "config": asdict(config),
        "mean_prompt_tokens": round(workload.mean_prompt_tokens, 1),
        "ttft_bound_s": round(bound, 4),
        "warm": warm,
        "modes": summary(alone, runs),
        "runs": runs,
        "interrupted": interrupted,
        "engine": "sglang",
        "threads": threads,
        "cpus": os.cpu_count(),
        "versions": {name: version(name) for name in ("sglang", "torch", "rag-pipeline")},
    }


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
    return "\n".join(lines) + "\n"


def _parser() -> OneLineParser:
    defaults, shape = ThroughputConfig(), WorkloadConfig()
    parser = OneLineParser(
        prog="rag-pipeline bench throughput",
        description="Throughput under Poisson arrivals, every mode on one HTTP server.",
    )
    add = parser.add_argument
    add("--model", default=defaults.model)
    add("--modes", default=defaults.modes, help="modes, comma between")
    add("--rates", default=defaults.rates, help="arrivals per second, or auto")
    add("--requests", type=int, default=shape.requests, help="prompts of each rate")
    add("--corpus", type=int, default=shape.corpus, help="distinct chunks in all")
    add("--chunks", type=int, default=shape.chunks, help="chunks per prompt")
    add("--chunk-tokens", type=int, default=shape.chunk_tokens)
    add("--zipf", type=float, default=shape.zipf, help="how unevenly chunks recur; 0 evenly")
    add("--output-tokens", type=int, default=defaults.output_tokens)
    add("--ttft-bound", type=float, default=None, help="seconds; bound of the goodput")
    add("--seed", type=int, default=shape.seed)
    add("--url", default=None, help="a running server; otherwise one is started")
    add("--engine-arg", action="append", default=[], metavar="NAME=JSON", help="server argument")
    add("--json", action="store_true", help="print one JSON object instead of the table")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run from a shell."""
    given = _parser().parse_args(arguments)
    try:
        config = ThroughputConfig(
            model=given.model,
            modes=given.modes,
            rates=given.rates,
            workload=WorkloadConfig(
                requests=given.requests,
                corpus=given.corpus,
                chunks=given.chunks,
                chunk_tokens=given.chunk_tokens,
                zipf=given.zipf,
                seed=given.seed,
            ),
            output_tokens=given.output_tokens,
            ttft_bound_s=given.ttft_bound,
            url=given.url,
            engine_args=engine_arguments(given.engine_arg),
        )
        report = run(config, lambda text: print(text, file=sys.stderr, flush=True))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(report) if given.json else table(report))
    return INTERRUPTED if report["interrupted"] else 0


if __name__ == "__main__":
    sys.exit(main())
