"""LangChain on this project: retriever, vector store, chat model, and a RAG runnable.

Needs the extra ``langchain``; nothing outside this folder imports LangChain.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from rag_pipeline.lazy import lazy_names

if TYPE_CHECKING:
    from rag_pipeline.langchain.chat_model import ChatSGLangRag
    from rag_pipeline.langchain.documents import to_chunk, to_document
    from rag_pipeline.langchain.embeddings import RagEmbeddings
    from rag_pipeline.langchain.retriever import RagRetriever
    from rag_pipeline.langchain.runnable import RagRunnable
    from rag_pipeline.langchain.vector_store import FaissVectorStore

_HOMES = {
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

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
