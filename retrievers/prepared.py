"""Documents that were split before they reach the ingest, such as in a process with limits of its own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from retrievers.types import Chunk


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedDocument:
    """A document by its chunks.

    Parameters
    ----------
    id : str
        As :attr:`retrievers.Document.id`.
    content_hash : str
        :func:`retrievers.document_hash` of the document: an unchanged one is skipped.
    chunks : iterable of Chunk
        Read once, and only where the document is new or changed.
    """

    id: str
    content_hash: str
    chunks: Iterable[Chunk]
