"""Bombs and pathological texts through the whole ingest: the HTTP process stays small, neighbours are served."""

from __future__ import annotations

from rag_eval.reliability.figure import Outcome, Plan
from rag_eval.uploads import run_hostile_files

GROWTH_MIB, JOB_S, START_S, SLOWDOWN = 256.0, 120.0, 10.0, 2.0
EMBEDDER = "all-minilm-l6-v2"
_FULL, _QUICK_SCALE = 500, 0.05


def run(plan: Plan) -> Outcome:
    """Full size: 500 files, some of which unpack to half a gigabyte."""
    from rag_pipeline.models import resolve_llm

    count = plan.size(_FULL, 10)
    scale = _QUICK_SCALE if plan.quick else 1.0
    outcome = Outcome()
    if count < _FULL:
        outcome.note = f"{count} of {_FULL} files, of {scale:g} times their full size"
    report = run_hostile_files(
        plan.folder,
        resolve_llm(plan.model).path,
        EMBEDDER,
        count=count,
        seed=plan.seed,
        scale=scale,
        job_seconds=int(JOB_S),
    )
    ends = report["ends"]
    outcome.tried = sum(sum(one.values()) for one in ends.values())
    if outcome.tried != count:
        outcome.fault(f"{outcome.tried} of {count} uploads ended")
    for fault in report["failed"]["faults"]:
        outcome.fault(fault)
    worst = report["worst"]
    outcome.measure("grown_mib", worst["grown_bytes"] / 2**20, GROWTH_MIB)
    # The limit is on the work; that of the process which stops it comes on top, and the wait for its turn.
    outcome.measure("job_s", worst["job_s"], JOB_S)
    outcome.measure("neighbour_starts_s", worst["neighbour_starts_s"], START_S)
    idle, busy = worst["search_p99_idle_s"], worst["search_p99_s"]
    outcome.measure("search_p99_idle_s", idle)
    outcome.measure("search_p99_s", busy)
    # A hundred searches have no p99 worth a promise.
    outcome.measure("search_slowdown", busy / idle, None if plan.quick else SLOWDOWN)
    outcome.worst["ends"] = ends
    return outcome
