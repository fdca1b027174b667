"""Simulations: ``rag-pipeline simulate tiers --trace FILE [--json]``.

Plays a trace of requests through memory and disk with each eviction policy and prints hit rates by tier, the share of
the tokens asked for that were in memory or on disk when their request was admitted. No engine and no model is needed.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rag_eval.arguments import OneLineParser
from rag_eval.command import broken_off
from rag_eval.errors import EvalError
from rag_eval.simulator.measure import DISK_SPEED, measure
from rag_eval.simulator.regimes import POLICIES, REGIMES, Regime
from rag_eval.simulator.traces import Trace, read_trace
from rag_eval.simulator.zipf import zipf_trace
from rag_pipeline.interrupts import one_interrupt

ZIPF = "zipf"


def main(words: Sequence[str] | None = None) -> int:
    """Simulate; print a table per regime or one JSON object."""
    parser = OneLineParser(prog="rag-pipeline simulate tiers", description=__doc__)
    parser.add_argument(
        "--trace",
        required=True,
        help=f"file in Mooncake's format (JSON lines), or {ZIPF} for generated RAG requests",
    )
    parser.add_argument("--limit", type=int, help="requests at most")
    parser.add_argument(
        "--policy", action="append", metavar="LABEL", help=f"may be repeated: {', '.join(POLICIES)}"
    )
    parser.add_argument(
        "--regime", action="append", choices=tuple(REGIMES), help="sizes and load; may be repeated"
    )
    parser.add_argument(
        "--memory",
        action="append",
        type=float,
        help="share of the distinct tokens; may be repeated",
    )
    parser.add_argument("--disk", action="append", type=float, help="the same for the disk")
    parser.add_argument("--load", action="append", type=float, help="work offered over work done")
    parser.add_argument("--ttl", type=float, help="look-ahead drops what was unused for SECONDS")
    parser.add_argument(
        "--disk-speed", type=float, default=DISK_SPEED, help="reading a token over computing it"
    )
    parser.add_argument("--seed", type=int, default=0, help=f"of --trace {ZIPF}")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    given = parser.parse_args(words)
    for name in ("limit", "ttl", "disk_speed"):
        value = getattr(given, name)
        if value is not None and not 0 < value < float("inf"):
            parser.error(f"--{name.replace('_', '-')} is {value}; it must be positive")
    sizes = (given.memory, given.disk, given.load)
    if any(sizes) and given.regime:
        parser.error("--regime names sizes and load; leave out --memory, --disk and --load")
    try:
        with one_interrupt():
            report = measure(
                _trace(given.trace, given.limit, given.seed),
                regimes=_custom(*sizes) if any(sizes) else _named(given.regime),
                policies=given.policy or POLICIES,
                ttl_s=given.ttl,
                disk_speed=given.disk_speed,
            )
    except EvalError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        return broken_off(measured=False)
    sys.stdout.write(json.dumps(report, indent=1) + "\n" if given.json else _table(report))
    sys.stdout.flush()
    return broken_off(measured=True) if report["interrupted"] else 0


def _trace(name: str, limit: int | None, seed: int) -> Trace:
    if name != ZIPF:
        return read_trace(Path(name), limit=limit)
    return zipf_trace(seed=seed) if limit is None else zipf_trace(limit, seed=seed)


def _named(names: Sequence[str] | None) -> dict[str, Regime]:
    return {name: REGIMES[name] for name in names or REGIMES}


def _custom(
    memory: Sequence[float] | None, disk: Sequence[float] | None, load: Sequence[float] | None
) -> dict[str, Regime]:
    """All combinations; what is not given is as in the first regime."""
    first = dataclasses.asdict(next(iter(REGIMES.values())))
    rows = itertools.product(
        memory or [first["memory"]], disk or [first["disk"]], load or [first["load"]]
    )
    return {
        f"memory {m:g}, disk {d:g}, load {x:g}": Regime(memory=m, disk=d, load=x)
        for m, d, x in rows
    }


def _table(report: dict[str, Any]) -> str:
    trace = report["trace"]
    lines = [
        f"{trace['name']}: {report['n']} requests, {trace['distinct_tokens']:,} distinct tokens; a store without bounds "
        f"would have {trace['unbounded_hits']:.1%} of what is asked for"
    ]
    for name, row in report["regimes"].items():
        lines += [
            "",
            f"{name}: memory {row['memory_tokens']:,} tokens, disk {row['disk_tokens']:,}, load {row['load']:g}, "
            f"{row['mean_queue']:g} requests waiting on average",
            f"  {'policy':22} {'memory':>7} {'disk':>7} {'hits':>7} {'fetched':>8} {'demoted':>8} {'dropped':>8}",
        ]
        lines += [
            f"  {label:22} {s['memory']:7.1%} {s['disk']:7.1%} {s['hits']:7.1%} {s['fetched']:8.1%} "
            f"{s['demoted']:8.1%} {s['dropped']:8.1%}"
            for label, s in row["policies"].items()
        ]
    ratio = report["dram_hits_lookahead_vs_lru"]
    if ratio is not None:
        low, high = report["spread"]
        lines += [
            "",
            f"memory hits of lookahead over lru, first regime: {ratio:g} ({low:g} to {high:g} over fifths)",
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
