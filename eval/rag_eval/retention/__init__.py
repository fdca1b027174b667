"""Retention in full on a model of ``transformers``: no engine, no pool; what the engine's memories are compared with."""

from __future__ import annotations

from rag_eval.retention.model import LayerCache, LayerRows, Pass, ShownModel
from rag_eval.retention.reference import (
    ReferenceMemory,
    build_memory,
    keep_pair,
    patched_scores,
    rule_scores,
)

__all__ = [
    "LayerCache",
    "LayerRows",
    "Pass",
    "ReferenceMemory",
    "ShownModel",
    "build_memory",
    "keep_pair",
    "patched_scores",
    "rule_scores",
]
