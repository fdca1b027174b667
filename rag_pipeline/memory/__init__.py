"""Memory of long conversations: answers from records of a fixed number of tokens (EpiCache), and its baselines."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rag_pipeline.lazy import lazy_names

if TYPE_CHECKING:
    from rag_pipeline.memory.builder import MemoryBuilder
    from rag_pipeline.memory.config import MemoryConfig, parse_memory
    from rag_pipeline.memory.memory import Memory, Prepared
    from rag_pipeline.memory.methods import MEMORY_METHODS
    from rag_pipeline.memory.plan import Candidate, Chain, MemoryPlan, Step, Utterance
    from rag_pipeline.memory.planner import Planner
    from rag_pipeline.memory.stats import BuildStats, MemoryStats

_HOMES = {
    "MEMORY_METHODS": "methods",
    "BuildStats": "stats",
    "Candidate": "plan",
    "Chain": "plan",
    "Memory": "memory",
    "MemoryBuilder": "builder",
    "MemoryConfig": "config",
    "MemoryPlan": "plan",
    "MemoryStats": "stats",
    "Planner": "planner",
    "Prepared": "memory",
    "Step": "plan",
    "Utterance": "plan",
    "parse_memory": "config",
}

__all__ = [
    "MEMORY_METHODS",
    "BuildStats",
    "Candidate",
    "Chain",
    "Memory",
    "MemoryBuilder",
    "MemoryConfig",
    "MemoryPlan",
    "MemoryStats",
    "Planner",
    "Prepared",
    "Step",
    "Utterance",
    "parse_memory",
]

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
