"""Reliability figures: ``rag-pipeline bench reliability [--only NAME] [--quick] [--json]``.

Each figure tries something hostile against a real server or index on this machine and reports what was tried, what
failed, and the worst value. The exit code is 1 when something failed.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rag_eval.arguments import INTERRUPTED, OneLineParser
from rag_eval.reliability import FIGURES, Outcome, Plan, figure


def main(words: Sequence[str] | None = None) -> int:
    """Run the figures that were asked for; print them as a table or as one JSON object."""
    parser = OneLineParser(prog="rag-pipeline bench reliability", description=__doc__)
    parser.add_argument(
        "--only", action="append", choices=tuple(FIGURES), help="run this figure; may be repeated"
    )
    parser.add_argument(
        "--quick", action="store_true", help="small sizes: minutes instead of hours"
    )
    parser.add_argument("--scale", type=float, default=1.0, help="share of the full size, up to 1")
    parser.add_argument("--model", default="smollm2-135m", help="model of the servers")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    given = parser.parse_args(words)
    if not 0 < given.scale <= 1:
        parser.error(f"--scale is {given.scale}; it must be above 0 and at most 1")
    found: dict[str, Outcome] = {}
    status = 0
    try:
        for name in given.only or FIGURES:
            with tempfile.TemporaryDirectory(prefix=f"rag-{name}-") as folder:
                plan = Plan(
                    quick=given.quick,
                    model=given.model,
                    seed=given.seed,
                    scale=given.scale,
                    folder=Path(folder),
                )
                found[name] = figure(name)(plan)
                if not found[name].tried:
                    found[name].fault("nothing was tried")
            if not given.json:
                sys.stdout.write(_lines(name, found[name]))
                sys.stdout.flush()
    except KeyboardInterrupt:
        sys.stderr.write("error: interrupted; the figures that were done are printed\n")
        status = INTERRUPTED
    if given.json:
        said = sys.argv[1:] if words is None else words
        sys.stdout.write(json.dumps(_report(found, said), indent=1) + "\n")
    return status or int(any(outcome.failed for outcome in found.values()))


def _report(found: dict[str, Outcome], words: Sequence[str]) -> dict[str, Any]:
    """One key per figure, and nothing else; each can be read without the others."""
    run = {
        "command": " ".join(["rag-pipeline bench reliability", *words]),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
    }
    return {name: outcome.to_json() | run for name, outcome in found.items()}


def _lines(name: str, outcome: Outcome) -> str:
    verdict = "passed" if not outcome.failed else f"FAILED {outcome.failed}"
    lines = [f"{name:10} {verdict}: {outcome.tried} tried in {outcome.seconds:.0f} s"]
    lines.append(f"           {FIGURES[name]}")
    for quantity, value in outcome.worst.items():
        limit = outcome.limits.get(quantity)
        promised = "" if limit is None else f" (promised: at most {limit})"
        lines.append(f"           {quantity} {value}{promised}")
    lines += [f"           {outcome.note}"] if outcome.note else []
    lines += [f"           FAULT {fault}" for fault in outcome.faults]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
