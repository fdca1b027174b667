"""Signals: what a policy may ask of the model before it chooses, and the passes that compute it.

A new signal needs no edit here: a policy names its signal itself, see :class:`~chunk_cache.policies.ScoredPolicy`.
"""

from __future__ import annotations

from chunk_cache.policies.signals.attention import AttentionSignal, MassObserver
from chunk_cache.policies.signals.base import (
    PassObserver,
    PassRows,
    ProbedRequest,
    ProbePasses,
    Signal,
)
from chunk_cache.policies.signals.deviation import DeviationObserver, DeviationSignal

__all__ = [
    "AttentionSignal",
    "DeviationObserver",
    "DeviationSignal",
    "MassObserver",
    "PassObserver",
    "PassRows",
    "ProbePasses",
    "ProbedRequest",
    "Signal",
]
