"""Backends that turn token ids into text: an engine in this process, or a server by URL."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rag_pipeline.generation.base import Backend
from rag_pipeline.lazy import lazy_names

if TYPE_CHECKING:
    from rag_pipeline.generation.engine import EngineBackend
    from rag_pipeline.generation.server import ServerBackend

__all__ = ["Backend", "EngineBackend", "ServerBackend"]

_HOMES = {"EngineBackend": "engine", "ServerBackend": "server"}

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
