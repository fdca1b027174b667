"""Backends that turn token ids into text: an engine in this process, or a server by URL."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rag_pipeline.generation.base import Backend

if TYPE_CHECKING:
    from rag_pipeline.generation.engine import EngineBackend
    from rag_pipeline.generation.server import ServerBackend

__all__ = ["Backend", "EngineBackend", "ServerBackend"]

_MODULES = {"EngineBackend": "engine", "ServerBackend": "server"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
