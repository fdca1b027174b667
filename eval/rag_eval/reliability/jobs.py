"""SIGKILL after 202: the next process finishes every accepted upload or reports it as failed."""

from __future__ import annotations

from rag_eval.reliability.figure import Outcome, Plan
from rag_eval.uploads import run_killed_jobs

EMBEDDER = "all-minilm-l6-v2"
_FULL = 200


def run(plan: Plan) -> Outcome:
    """Full size: 200 kills, one to three uploads before each."""
    from rag_pipeline.models import resolve_llm

    kills = plan.size(_FULL, 4)
    outcome = Outcome(note=f"{kills} of {_FULL} kills" if kills < _FULL else "")
    model = resolve_llm(plan.model).path
    report = run_killed_jobs(plan.folder, model, EMBEDDER, kills=kills, seed=plan.seed)
    outcome.tried = int(report["tried"]["uploads"])
    for kind, names in report["failed"].items():
        for name in names:
            outcome.fault(f"{kind.replace('_', ' ')}: {name}")
    outcome.measure("uploads_lost", report["worst"]["uploads_lost"])
    outcome.worst |= {"kills": kills, "ends": report["ends"]}
    if not report["ends"].get("done"):
        outcome.fault("no upload was ever done")
    return outcome
