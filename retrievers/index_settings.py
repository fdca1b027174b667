"""What decides the contents of an index besides the documents, and digests that show a change."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from retrievers.types import Chunk, Document


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexSettings:
    """What decides the contents of an index besides the documents.

    Parameters
    ----------
    embedder_name, embedder_fingerprint, dim : str, str, int
        Model of the vectors.
    splitter : mapping
        Settings of the splitter, JSON values.
    tokenizer_fingerprint : str
        Tokenizer that measures chunks.
    factory : str or None
        FAISS factory string, or ``"auto"`` (:func:`choose_factory`); ``None`` keeps what the
        index has.
    search_options : str or None
        FAISS parameter string stored with the index; ``None`` keeps what the index has, or takes
        what goes with ``"auto"``.
    include_title : bool
        Whether the title is embedded and matched with the text.
    """

    embedder_name: str
    embedder_fingerprint: str
    dim: int
    splitter: Mapping[str, Any]
    tokenizer_fingerprint: str
    factory: str | None = None
    search_options: str | None = None
    include_title: bool = True


def indexed_text(chunk: Chunk, include_title: bool) -> str:
    """Text to embed and match: the title names what a passage only refers to."""
    if not include_title or not chunk.title or chunk.text.startswith(chunk.title):
        return chunk.text
    return f"{chunk.title}\n{chunk.text}"


def document_hash(document: Document, settings: IndexSettings) -> str:
    """Digest of a document and of everything that decides its chunks and vectors."""
    content = json.dumps(
        [
            document.text,
            document.title,
            document.path,
            sorted(document.metadata.items()),
            settings.splitter,
            settings.tokenizer_fingerprint,
            settings.include_title,
        ],
        sort_keys=True,
    )
    return settings_mark(settings) + hashlib.sha256(content.encode()).hexdigest()[:32]


def settings_mark(settings: IndexSettings) -> str:
    """Digest of the settings alone, the first part of a document's hash."""
    parts = [settings.splitter, settings.tokenizer_fingerprint, settings.include_title]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:8]
