"""What a request's chunks cost to load and to compute, agreed on by all ranks at admission."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import NamedTuple

from chunk_cache import LoadingChunk
from rag_pipeline.sglang_plugin.fusion.request.attempt import ReuseCost
from rag_pipeline.sglang_plugin.fusion.request.holdings import LeasedSpan
from rag_pipeline.sglang_plugin.fusion.runtime.rates import MEMORY
from rag_pipeline.sglang_plugin.fusion.runtime.runtime import FusionRuntime


class RankCost(NamedTuple):
    """What one rank measured; ``None`` where it has no evidence yet."""

    row_s: float | None
    """Seconds to compute a row."""
    loads: Mapping[Hashable, float | None]
    """Seconds to load each run."""


def estimate(
    runtime: FusionRuntime, spans: Sequence[LeasedSpan], runs: Sequence[Hashable]
) -> RankCost:
    """Estimate on this rank what loading leased spans costs, as their runs are named in the vote.

    A record in memory is read and rotated; of one that is on its way the missing layers come on top, from its tier,
    where as many threads read as there are such records.
    """
    loading = sum(isinstance(span.lease.record, LoadingChunk) for span in spans)
    threads = 1 if runtime.fetcher is None else runtime.fetcher.num_threads
    parallel = max(1, min(threads, loading))
    loads = (_load_s(runtime, span, parallel) for span in spans)
    return RankCost(runtime.rates.row_s, dict(zip(runs, loads, strict=True)))


def _load_s(runtime: FusionRuntime, span: LeasedSpan, parallel: int) -> float | None:
    record, rates = span.lease.record, runtime.rates
    whole = record.record if isinstance(record, LoadingChunk) else record
    num_bytes = whole.k.nbytes + whole.v.nbytes
    load_s = rates.load_s(MEMORY, num_bytes * (span.end - span.start) // record.num_tokens)
    if load_s is None or not isinstance(record, LoadingChunk):
        return load_s
    missing = num_bytes * (record.num_layers - record.num_filled) // record.num_layers
    fetch_s = rates.load_s(record.source, missing)
    return None if fetch_s is None else load_s + fetch_s / parallel


def agree(costs: Sequence[RankCost], agreed: Collection[Hashable]) -> ReuseCost | None:
    """Cost of the runs that every rank loads: that of the slowest rank, for which the others wait.

    Parameters
    ----------
    costs : sequence of RankCost
        Of all ranks; the same on each.
    agreed : collection of hashable
        Names of the runs.

    Returns
    -------
    ReuseCost or None
        ``None`` where some rank lacks evidence, or nothing is loaded.
    """
    rows = [cost.row_s for cost in costs]
    loads = [[cost.loads.get(run) for cost in costs] for run in agreed]
    numbers = [n for row in (rows, *loads) for n in row]
    if not agreed or None in numbers:
        return None
    return ReuseCost(
        row_s=max(n for n in rows if n is not None),
        # Summed in one order: the last bit of a sum depends on it, and a rank must not round otherwise.
        load_s=sum(sorted(max(n for n in row if n is not None) for row in loads)),
    )
