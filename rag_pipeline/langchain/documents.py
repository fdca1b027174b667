"""LangChain documents to chunks of an index and back, without losing any metadata."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

from langchain_core.documents import Document

from retrievers import RetrievalError
from retrievers.types import Chunk, SearchHit

REST_FIELD = "langchain_json"
"""Metadata field that carries, as JSON, what an index cannot hold as a column."""

_RESERVED = frozenset({"document_id", "title", "path", REST_FIELD})


def to_chunk(document: Document, *, chunk_id: str | None = None) -> Chunk:
    """Chunk with the text and metadata of a LangChain document.

    Texts, numbers and truth values become fields that a filter can select on. Everything else
    (lists, mappings, ``None``, names that the index reserves) is kept as JSON and comes back
    unchanged, but cannot be filtered on. ``title`` and ``path`` become the chunk's own.

    Parameters
    ----------
    document
        Any LangChain document; not changed.
    chunk_id
        Identifier; by default the document's ``id``, or a digest of its content where it has none.

    Returns
    -------
    Chunk
        A document of one chunk: its ``document_id`` is its ``id``, ``num_tokens`` is 0 (unknown).

    Raises
    ------
    RetrievalError
        Metadata that JSON cannot hold.
    """
    metadata = dict(document.metadata)
    name = chunk_id or document.id or _content_id(document)
    title, path = metadata.get("title"), metadata.get("path")
    own: dict[str, str] = {}
    if isinstance(title, str) and title:
        own["title"] = title
    if isinstance(path, str) and path:
        own["path"] = path
    columns = {
        key: value for key, value in metadata.items() if key not in own and _fits(key, value)
    }
    rest = {key: value for key, value in metadata.items() if key not in own and key not in columns}
    if rest:
        columns[REST_FIELD] = _dump(rest, name)
    return Chunk(
        id=name,
        document_id=name,
        text=document.page_content,
        title=own.get("title", ""),
        path=own.get("path"),
        start=0,
        end=len(document.page_content),
        num_tokens=0,
        metadata=columns,
    )


def to_document(chunk: Chunk, *, score: float | None = None, source: bool = False) -> Document:
    """LangChain document of a chunk; undoes :func:`to_chunk`.

    Parameters
    ----------
    chunk
        From any index.
    score
        Put into the metadata as ``score`` where given.
    source
        Whether ``document_id``, ``start`` and ``end`` (characters) go into the metadata too.

    Returns
    -------
    Document
        ``id`` is the chunk's.
    """
    metadata: dict[str, Any] = dict(chunk.metadata)
    rest = metadata.pop(REST_FIELD, None)
    if rest is not None:
        metadata |= json.loads(str(rest))
    if chunk.title:
        metadata["title"] = chunk.title
    if chunk.path is not None:
        metadata["path"] = chunk.path
    if source:
        metadata |= {"document_id": chunk.document_id, "start": chunk.start, "end": chunk.end}
    if score is not None:
        metadata["score"] = score
    return Document(id=chunk.id, page_content=chunk.text, metadata=metadata)


def to_hit(document: Document, rank: int) -> SearchHit:
    """Search hit of a document from any LangChain retriever.

    Retrievers promise an order and no scores, so the score is the negative rank: a prompt that is
    too long loses the documents that came last.
    """
    return SearchHit(chunk=to_chunk(document), score=float(-rank))


def _content_id(document: Document) -> str:
    text = json.dumps([document.page_content, document.metadata], sort_keys=True, default=repr)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _fits(key: str, value: object) -> bool:
    """Whether the index can hold a field as a column that a filter selects on."""
    if key in _RESERVED or key.startswith("$"):
        return False
    return isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))


def _dump(rest: Mapping[str, Any], name: str) -> str:
    try:
        return json.dumps(rest, sort_keys=True)
    except (TypeError, ValueError) as error:
        raise RetrievalError(
            f"metadata of document {name!r} cannot be stored ({error}); use texts, numbers, truth "
            "values, lists and mappings"
        ) from None
