"""Retrieval: from files to ranked chunks. Knows no SGLang, and no torch until a model is needed.

This is the package's only public door. Names are resolved on first use, so importing it costs
nothing and a command that only prints help never loads FAISS or a parser.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from retrievers.bm25 import Bm25Index
    from retrievers.bm25_builder import Bm25Builder
    from retrievers.dense import DenseIndex
    from retrievers.distinct import DistinctRetriever
    from retrievers.documents import DocumentRecord, chunk_count, document_records
    from retrievers.embedding import Embedder
    from retrievers.errors import (
        CorruptIndexError,
        EmbedderMismatchError,
        IndexBusyError,
        RetrievalError,
        StorageError,
    )
    from retrievers.faiss_factory import choose_factory
    from retrievers.filters import Filter
    from retrievers.hybrid import HybridRetriever
    from retrievers.index_settings import IndexSettings, document_hash, indexed_text
    from retrievers.index_store import Index
    from retrievers.index_writer import IndexWriter
    from retrievers.ingest_report import IngestProgress, IngestReport
    from retrievers.ingestion import Splitter, delete_documents, finish_removals, ingest
    from retrievers.live_index import LiveIndex, LiveRetriever
    from retrievers.loaders import LoadReport, SkippedSource, load_corpus, load_file
    from retrievers.manifest import Manifest
    from retrievers.metadata import storable_document, storable_text
    from retrievers.prepared import PreparedDocument
    from retrievers.removal import Erase, Removal
    from retrievers.rerank import CrossEncoderReranker, RerankedRetriever, Reranker
    from retrievers.splitter import TokenSplitter
    from retrievers.terms import text_terms
    from retrievers.text_embedder import TextEmbedder
    from retrievers.tokenizer import HFTokenizer
    from retrievers.types import Chunk, Document, Retriever, Scalar, SearchHit, Tokenizer

# One line a public name: where it lives. Add yours here and, for type checkers, above.
_EXPORTS = {
    "Bm25Builder": "retrievers.bm25_builder",
    "Bm25Index": "retrievers.bm25",
    "Chunk": "retrievers.types",
    "CorruptIndexError": "retrievers.errors",
    "CrossEncoderReranker": "retrievers.rerank",
    "DenseIndex": "retrievers.dense",
    "DistinctRetriever": "retrievers.distinct",
    "Document": "retrievers.types",
    "DocumentRecord": "retrievers.documents",
    "Embedder": "retrievers.embedding",
    "EmbedderMismatchError": "retrievers.errors",
    "Erase": "retrievers.removal",
    "Filter": "retrievers.filters",
    "HFTokenizer": "retrievers.tokenizer",
    "HybridRetriever": "retrievers.hybrid",
    "Index": "retrievers.index_store",
    "IndexBusyError": "retrievers.errors",
    "IndexSettings": "retrievers.index_settings",
    "IndexWriter": "retrievers.index_writer",
    "IngestProgress": "retrievers.ingest_report",
    "IngestReport": "retrievers.ingest_report",
    "LiveIndex": "retrievers.live_index",
    "LiveRetriever": "retrievers.live_index",
    "LoadReport": "retrievers.loaders",
    "Manifest": "retrievers.manifest",
    "PreparedDocument": "retrievers.prepared",
    "Removal": "retrievers.removal",
    "RerankedRetriever": "retrievers.rerank",
    "Reranker": "retrievers.rerank",
    "RetrievalError": "retrievers.errors",
    "Retriever": "retrievers.types",
    "Scalar": "retrievers.types",
    "SearchHit": "retrievers.types",
    "StorageError": "retrievers.errors",
    "SkippedSource": "retrievers.loaders",
    "Splitter": "retrievers.ingestion",
    "TextEmbedder": "retrievers.text_embedder",
    "TokenSplitter": "retrievers.splitter",
    "Tokenizer": "retrievers.types",
    "choose_factory": "retrievers.faiss_factory",
    "chunk_count": "retrievers.documents",
    "delete_documents": "retrievers.ingestion",
    "document_hash": "retrievers.index_settings",
    "document_records": "retrievers.documents",
    "finish_removals": "retrievers.ingestion",
    "indexed_text": "retrievers.index_settings",
    "ingest": "retrievers.ingestion",
    "load_corpus": "retrievers.loaders",
    "load_file": "retrievers.loaders",
    "storable_document": "retrievers.metadata",
    "storable_text": "retrievers.metadata",
    "text_terms": "retrievers.terms",
}

__all__ = [
    "Bm25Builder",
    "Bm25Index",
    "Chunk",
    "CorruptIndexError",
    "CrossEncoderReranker",
    "DenseIndex",
    "DistinctRetriever",
    "Document",
    "DocumentRecord",
    "Embedder",
    "EmbedderMismatchError",
    "Erase",
    "Filter",
    "HFTokenizer",
    "HybridRetriever",
    "Index",
    "IndexBusyError",
    "IndexSettings",
    "IndexWriter",
    "IngestProgress",
    "IngestReport",
    "LiveIndex",
    "LiveRetriever",
    "LoadReport",
    "Manifest",
    "PreparedDocument",
    "Removal",
    "RerankedRetriever",
    "Reranker",
    "RetrievalError",
    "Retriever",
    "Scalar",
    "SearchHit",
    "SkippedSource",
    "Splitter",
    "StorageError",
    "TextEmbedder",
    "TokenSplitter",
    "Tokenizer",
    "choose_factory",
    "chunk_count",
    "delete_documents",
    "document_hash",
    "document_records",
    "finish_removals",
    "indexed_text",
    "ingest",
    "load_corpus",
    "load_file",
    "storable_document",
    "storable_text",
    "text_terms",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'retrievers' has no attribute {name!r}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
