"""SGLang frontend programs with chunks: ``s += chunks(docs)`` inside ``@sgl.function``.

The chunks keep their exact borders, in tokens, on the way through the program to the engine, so
their KV is reused in every branch, every turn and every program of a batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rag_pipeline.lazy import lazy_names

if TYPE_CHECKING:
    from rag_pipeline.frontend.chunks import chunks, control, truncated, usage
    from rag_pipeline.frontend.endpoint import RagEndpoint
    from rag_pipeline.frontend.in_process import RagEngine
    from rag_pipeline.frontend.marked_text import MarkedText

_HOMES = {
    "MarkedText": "marked_text",
    "RagEndpoint": "endpoint",
    "RagEngine": "in_process",
    "chunks": "chunks",
    "control": "chunks",
    "truncated": "chunks",
    "usage": "chunks",
}

__all__ = ["MarkedText", "RagEndpoint", "RagEngine", "chunks", "control", "truncated", "usage"]

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
