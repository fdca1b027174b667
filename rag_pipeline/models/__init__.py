"""From a name to a folder of weights: hub ids, folders, GGUF files, packaged models."""

from __future__ import annotations

from rag_pipeline.models.converted import verify_model
from rag_pipeline.models.fingerprint import fingerprint_checkpoint
from rag_pipeline.models.resolver import ResolvedModel, resolve_embedder, resolve_llm

__all__ = [
    "ResolvedModel",
    "fingerprint_checkpoint",
    "resolve_embedder",
    "resolve_llm",
    "verify_model",
]
