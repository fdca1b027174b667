"""How many of the best documents PowerAttention reads straight from the question, by order of the documents.

``python -m rag_eval.benchmarks.power_order --json``

Prompts of random document lengths; no model runs. For each number of documents, the share of the best ones that the
last row reads as a whole (one hop), and the share of their tokens that it reads: in the order of scores with the best
last and with the best first, in the order that puts the best at both ends, and in that of
:func:`rag_pipeline.prompts.power_order.place_for_power`. The time of the last is what it costs per request.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from rag_eval.arguments import require_at_least
from rag_eval.benchmarks.frame import benchmark_parser, keep_measured, run_benchmark, versions_of
from rag_eval.command import Progress, no_progress
from rag_eval.errors import EvalError
from rag_pipeline.errors import RagPipelineError
from rag_pipeline.prompts.power_order import (
    Placement,
    lost_in_the_middle_order,
    place_for_power,
    placement_of,
)

_ORDERS = ("best_first", "best_last", "both_ends", "placed")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PowerOrderConfig:
    """Sizes of a run."""

    documents: str = "8,16,32"
    """Documents of a prompt, one part of the table each."""
    shortest: int = 150
    """Tokens of the shortest document."""
    longest: int = 450
    """Tokens of the longest document; lengths are drawn evenly."""
    best: int = 4
    """Best documents that count."""
    before: int = 40
    """Tokens in front of the documents."""
    behind: int = 40
    """Tokens behind them."""
    method: str = "power"
    """Static attention method, with its options."""
    prompts: int = 50
    """Prompts per number of documents."""
    seed: int = 0
    """Seed of the lengths."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "shortest", "best", "behind", "prompts")
        require_at_least(self, 0, "before", "seed")
        if self.longest < self.shortest:
            raise EvalError(f"longest is {self.longest}; it must be at least {self.shortest}")
        try:
            smallest = min(self.counts)
            _ = placement_of([0], [1], before=0, behind=1, method=self.method)
        except (ValueError, RagPipelineError) as error:
            raise EvalError(str(error)) from None
        if smallest < self.best:
            raise EvalError(f"best is {self.best} of {smallest} documents; give at most so many")

    @property
    def counts(self) -> list[int]:
        """:attr:`documents` as numbers."""
        return [int(word) for word in self.documents.split(",")]


def run(config: PowerOrderConfig, progress: Progress = no_progress) -> dict[str, Any]:
    """Place the documents of every prompt in each order.

    Returns
    -------
    dict
        ``documents{N{ORDER}}`` with ``one_hop`` and ``tokens_read`` of the best documents (``mean``, ``sd`` over
        prompts, ``n``), and ``place_ms``, the median of the search; ``config``, ``versions``.
    """
    random = np.random.default_rng(config.seed)
    found: dict[str, Any] = {}
    with keep_measured(lambda: found) as end:
        for count in config.counts:
            progress(f"{count} documents")
            placed: dict[str, list[Placement]] = {order: [] for order in _ORDERS}
            spent = []
            for _ in range(config.prompts):
                lengths = random.integers(config.shortest, config.longest + 1, count).tolist()
                around: dict[str, Any] = {
                    "before": config.before,
                    "behind": config.behind,
                    "method": config.method,
                }
                began = time.perf_counter()
                placed["placed"].append(place_for_power(lengths, **around))
                spent.append(1e3 * (time.perf_counter() - began))
                given = {
                    "best_first": list(range(count)),
                    "best_last": list(range(count))[::-1],
                    "both_ends": lost_in_the_middle_order(count),
                }
                for name, order in given.items():
                    placed[name].append(placement_of(order, lengths, **around))
            found[str(count)] = {
                name: {
                    "one_hop": _mean([each.one_hop(config.best) / config.best for each in all_of]),
                    "tokens_read": _mean(
                        [float(np.mean(each.shares[: config.best])) for each in all_of]
                    ),
                }
                for name, all_of in placed.items()
            } | {"place_ms": round(float(np.median(spent)), 2)}
    return {
        "benchmark": "power_order",
        "documents": found,
        "config": dataclasses.asdict(config),
        "versions": versions_of("python", "numpy"),
    } | end.report()


def _mean(values: list[float]) -> dict[str, Any]:
    return {
        "mean": round(float(np.mean(values)), 4),
        "sd": round(float(np.std(values)), 4),
        "n": len(values),
    }


def table(report: dict[str, Any]) -> str:
    """The report as text: a line per number of documents and order."""
    lines = [f"{'documents':>9}  {'order':<12}{'one hop':>9}{'tokens read':>13}"]
    for count, orders in report["documents"].items():
        for name in _ORDERS:
            one = orders[name]
            lines.append(
                f"{count:>9}  {name:<12}{one['one_hop']['mean']:>9.2f}{one['tokens_read']['mean']:>13.2f}"
            )
    costs = ", ".join(f"{n}: {orders['place_ms']} ms" for n, orders in report["documents"].items())
    best, method = report["config"]["best"], report["config"]["method"]
    lines.append(f"of the best {best} documents, by {method!r}; the search took {costs}")
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> int:
    """Run the benchmark from a command line; returns the exit code."""
    parser = benchmark_parser("python -m rag_eval.benchmarks.power_order", __doc__)
    return run_benchmark(parser, PowerOrderConfig, run, table, words)


if __name__ == "__main__":
    sys.exit(main())
