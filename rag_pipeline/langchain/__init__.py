"""LangChain on this project: retriever, vector store, chat model, and a RAG runnable.

Needs the extra ``langchain``; nothing outside this folder imports LangChain.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rag_pipeline.langchain.chat_model import ChatSGLangRag
    from rag_pipeline.langchain.documents import to_chunk, to_document
    from rag_pipeline.langchain.embeddings import RagEmbeddings
    from rag_pipeline.langchain.retriever import RagRetriever
    from rag_pipeline.langchain.runnable import RagRunnable
    from rag_pipeline.langchain.vector_store import FaissVectorStore

_MODULES = {
    "ChatSGLangRag": "chat_model",
    "FaissVectorStore": "vector_store",
    "RagEmbeddings": "embeddings",
    "RagRetriever": "retriever",
    "RagRunnable": "runnable",
    "to_chunk": "documents",
    "to_document": "documents",
}

__all__ = [
    "ChatSGLangRag",
    "FaissVectorStore",
    "RagEmbeddings",
    "RagRetriever",
    "RagRunnable",
    "to_chunk",
    "to_document",
]

_missing = [name for name in ("langchain_core", "langchain_openai") if find_spec(name) is None]
if _missing:
    raise ImportError(
        f"rag_pipeline.langchain needs {' and '.join(_missing)}, not installed here; "
        'run: pip install "rag-pipeline[langchain]"'
    )


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
