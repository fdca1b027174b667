"""SGLang frontend programs with chunks: ``s += chunks(docs)`` inside ``@sgl.function``.

The chunks keep their exact borders, in tokens, on the way through the program to the engine, so
their KV is reused in every branch, every turn and every program of a batch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rag_pipeline.frontend.chunks import chunks, control, usage
    from rag_pipeline.frontend.endpoint import RagEndpoint
    from rag_pipeline.frontend.in_process import RagEngine
    from rag_pipeline.frontend.marked_text import MarkedText

_MODULES = {
    "MarkedText": "marked_text",
    "RagEndpoint": "endpoint",
    "RagEngine": "in_process",
    "chunks": "chunks",
    "control": "chunks",
    "usage": "chunks",
}

__all__ = ["MarkedText", "RagEndpoint", "RagEngine", "chunks", "control", "usage"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    # The module `chunks` and the function of that name: the function must win.
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
