"""Load and abuse of one server: ``python -m rag_eval.benchmarks.load --model M [--seconds N] [--json]``.

A real server with two tenants is started on this machine and gets a mix of requests, many at once: fused
and ordinary ones, streams that are dropped, malformed and oversized bodies, uploads and deletions. In the
end it must be whole: nothing runs, every KV slot is free, the chunk cache agrees with itself, no tenant has
seen a word of the other's documents, and every malformed request got a 4xx with one line.

It measures as well, but it is a test first: the exit code is 1 when one of these does not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rag_eval.arguments import OneLineParser, add_json_option
from rag_eval.benchmarks.load_requests import KINDS
from rag_eval.benchmarks.load_run import LoadReport, LoadTarget, run_load
from rag_eval.benchmarks.load_server import started_server

__all__ = ["LoadReport", "LoadTarget", "main", "run_load"]


def main(words: Sequence[str] | None = None) -> int:
    """Start a server, load it, check it, print the summary."""
    parser = OneLineParser(prog="python -m rag_eval.benchmarks.load", description=__doc__)
    parser.add_argument("--model", required=True, help="model folder or name; a tiny one will do")
    parser.add_argument("--seconds", type=float, default=120.0, help="how long to send")
    parser.add_argument("--concurrency", type=int, default=200, help="requests under way at once")
    parser.add_argument("--seed", type=int, default=0, help="of the mix")
    parser.add_argument(
        "--server-flag", action="append", default=[], help="flag=value for `rag-pipeline serve`"
    )
    add_json_option(parser)
    given = parser.parse_args(words)
    _check(parser, given)
    with (
        tempfile.TemporaryDirectory(prefix="rag-load-") as folder,
        started_server(given.model, Path(folder), given.server_flag) as target,
    ):
        report = asyncio.run(
            run_load(target, seconds=given.seconds, concurrency=given.concurrency, seed=given.seed)
        )
    if given.json:
        sys.stdout.write(json.dumps(asdict(report)) + "\n")
    else:
        sys.stdout.write(_table(report))
    return 0 if not report.faults else 1


def _check(parser: argparse.ArgumentParser, given: argparse.Namespace) -> None:
    if given.seconds <= 0:
        parser.error(f"--seconds is {given.seconds}; it must be above 0")
    if not 1 <= given.concurrency <= 2000:
        parser.error(f"--concurrency is {given.concurrency}; it must be from 1 to 2000")


def _table(report: LoadReport) -> str:
    lines = [f"{report.requests} requests in {report.seconds:.0f} s, {report.concurrency} at once"]
    for kind in KINDS:
        found: dict[str, Any] = report.kinds.get(kind, {})
        if found:
            lines.append(
                f"  {kind:12} {found['sent']:6}  status {found['status']}  "
                f"p50 {found['p50_s']:.2f} s  p95 {found['p95_s']:.2f} s"
            )
    lines.append(f"  at rest: {json.dumps(report.at_rest)}")
    lines += [f"  FAULT: {fault}" for fault in report.faults] or ["  no faults"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
