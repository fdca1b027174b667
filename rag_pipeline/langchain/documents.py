"""LangChain documents to chunks of an index and back, without losing any metadata."""

from __future__ import annotations

import hashlib
import json
from enum import Enum
from typing import Any

from langchain_core.documents import Document

from rag_pipeline.langchain.metadata import is_writable, join_metadata, split_metadata
from retrievers.types import Chunk


def to_chunk(document: Document, *, chunk_id: str | None = None) -> Chunk:
    """Chunk with the text and metadata of a LangChain document.

    Texts, numbers, truth values, dates, UUIDs, paths, decimals and enumeration members become fields
    that a filter can select on. Everything else (lists, mappings, ``None``, arrays, names that the
    index reserves) cannot be filtered on. All come back equal to what was given
    (:mod:`.metadata`). ``title`` and ``path`` become the chunk's own.

    Parameters
    ----------
    document : Document
        Any LangChain document; not changed.
    chunk_id : str, optional
        Identifier; by default the document's ``id``, or a digest of its content where it has none.

    Returns
    -------
    Chunk
        A document of one chunk: its ``document_id`` is its ``id``, ``num_tokens`` is 0 (unknown).

    Raises
    ------
    RetrievalError
        Metadata of a type that cannot be given back.
    """
    name = chunk_id or document_id(document)
    own = {key: text for key in ("title", "path") if (text := _own_text(document, key))}
    others = {
        key: value
        for key, value in document.metadata.items()
        if key not in own or isinstance(value, Enum)
    }
    return Chunk(
        id=name,
        document_id=name,
        text=document.page_content,
        title=own.get("title", ""),
        path=own.get("path"),
        start=0,
        end=len(document.page_content),
        num_tokens=0,
        metadata=split_metadata(others, name),
    )


def to_document(chunk: Chunk, *, score: float | None = None, source: bool = False) -> Document:
    """LangChain document of a chunk; undoes :func:`to_chunk`.

    Parameters
    ----------
    chunk : Chunk
        From any index.
    score : float, optional
        Put into the metadata as ``score`` where given.
    source : bool
        Whether ``document_id``, ``start`` and ``end`` (characters) go into the metadata too.

    Returns
    -------
    Document
        ``id`` is the chunk's.
    """
    metadata = join_metadata(chunk.metadata)
    if chunk.title:
        metadata.setdefault("title", chunk.title)
    if chunk.path is not None:
        metadata.setdefault("path", chunk.path)
    if source:
        metadata |= {"document_id": chunk.document_id, "start": chunk.start, "end": chunk.end}
    if score is not None:
        metadata["score"] = score
    return Document(id=chunk.id, page_content=chunk.text, metadata=metadata)


def document_id(document: Document) -> str:
    """Name of a document: its own id, or a digest of its content where it has none."""
    if document.id:
        return document.id
    named = [document.page_content, document.metadata]
    # NOTE: never repr(): it may hold an address, which differs from one process to the next.
    try:
        text = json.dumps(named, skipkeys=True, default=lambda value: type(value).__name__)
    except (ValueError, RecursionError):  # metadata that holds itself
        text = json.dumps([document.page_content])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def document_title(document: Document) -> str:
    """Title as it stands in a prompt; empty where the metadata names none."""
    return _own_text(document, "title")


def _own_text(document: Document, key: str) -> str:
    value: Any = document.metadata.get(key)
    return str.__str__(value) if isinstance(value, str) and is_writable(value) else ""
