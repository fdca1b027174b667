"""RAG serving on SGLang: resolve models, lay out prompts, retrieve, generate.

Names are loaded when they are first used, so that ``import rag_pipeline`` costs next to nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rag_pipeline.lazy import lazy_names

if TYPE_CHECKING:
    from rag_pipeline.errors import EngineError, ModelError, RagPipelineError
    from rag_pipeline.generation import EngineBackend, ServerBackend
    from rag_pipeline.models import resolve_embedder, resolve_llm
    from rag_pipeline.pipeline import RagPipeline
    from rag_pipeline.prompts.builder import PromptBuilder
    from rag_pipeline.prompts.tokenizer import ModelTokenizer
    from rag_pipeline.protocol import SamplingOptions, Usage
    from rag_pipeline.types import Answer, PromptLayout, Source, Span

_HOMES = {
    "Answer": "types",
    "EngineBackend": "generation",
    "EngineError": "errors",
    "ModelError": "errors",
    "ModelTokenizer": "prompts",
    "PromptBuilder": "prompts",
    "PromptLayout": "types",
    "RagPipeline": "pipeline",
    "RagPipelineError": "errors",
    "SamplingOptions": "protocol",
    "ServerBackend": "generation",
    "Source": "types",
    "Span": "types",
    "Usage": "protocol",
    "resolve_embedder": "models",
    "resolve_llm": "models",
}

__all__ = [
    "Answer",
    "EngineBackend",
    "EngineError",
    "ModelError",
    "ModelTokenizer",
    "PromptBuilder",
    "PromptLayout",
    "RagPipeline",
    "RagPipelineError",
    "SamplingOptions",
    "ServerBackend",
    "Source",
    "Span",
    "Usage",
    "resolve_embedder",
    "resolve_llm",
]

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
