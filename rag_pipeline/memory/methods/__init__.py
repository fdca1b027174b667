"""Methods of a conversation's memory, by name."""

from __future__ import annotations

from rag_pipeline.memory.methods.base import MemoryMethod
from rag_pipeline.memory.methods.registry import MEMORY_METHODS, create_method

__all__ = ["MEMORY_METHODS", "MemoryMethod", "create_method"]
