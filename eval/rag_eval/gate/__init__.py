"""Model gate: whether fusion keeps its promises on one model, with the versions installed.

``rag-pipeline eval gate --model M`` proves what must be exact, measures how far each policy is from
full prefill on planted facts, judges both by documented limits and keeps the verdict for ``doctor``.
Nothing heavy is imported before a gate runs: ``doctor`` reads verdicts from here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rag_pipeline.lazy import lazy_names

if TYPE_CHECKING:
    from rag_eval.gate.command import main
    from rag_eval.gate.gate import GateConfig, run_gate
    from rag_eval.gate.record import last_gate, save_gate
    from rag_eval.gate.thresholds import Thresholds

__all__ = ["GateConfig", "Thresholds", "last_gate", "main", "run_gate", "save_gate"]

_HOME = {
    "GateConfig": "gate",
    "Thresholds": "thresholds",
    "last_gate": "record",
    "main": "command",
    "run_gate": "gate",
    "save_gate": "record",
}

__getattr__, __dir__ = lazy_names(__name__, _HOME)
