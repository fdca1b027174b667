"""Simulator of the store's tiers: the engine's own eviction policies over a trace of requests."""

from __future__ import annotations

from rag_eval.simulator.measure import measure
from rag_eval.simulator.regimes import POLICIES, REGIMES, Regime
from rag_eval.simulator.traces import Trace, TraceJob, read_trace
from rag_eval.simulator.zipf import zipf_trace

__all__ = [
    "POLICIES",
    "REGIMES",
    "Regime",
    "Trace",
    "TraceJob",
    "measure",
    "read_trace",
    "zipf_trace",
]
