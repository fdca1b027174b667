"""An index folder whose documents come and go by id, and are read and found meanwhile.

Takes and gives chunks; what LangChain makes of them is :mod:`.vector_store`'s matter.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from retrievers import Index, IndexSettings, IndexWriter, Manifest, RetrievalError, TextEmbedder
from retrievers.index_settings import document_hash
from retrievers.manifest import MANIFEST_NAME
from retrievers.types import Chunk, Document, SearchHit

_BATCH = 512


class DocumentFolder:
    """One index folder, changed by one thread at a time while others read the last whole state.

    Parameters
    ----------
    path
        Index folder, created with the first document.
    embedder
        Model of the index.
    factory
        FAISS factory string of a new index, or ``"auto"``.

    Raises
    ------
    EmbedderMismatchError
        Where the folder holds an index of another model.
    """

    def __init__(self, path: Path, embedder: TextEmbedder, *, factory: str | None = None) -> None:
        self._path = path
        self._embedder = embedder
        self._factory = factory
        self._change = threading.Lock()
        self._index: Index | None = None
        self.reload()

    def __len__(self) -> int:
        """Chunks in the folder."""
        return 0 if self._index is None else len(self._index)

    def reload(self) -> None:
        """See what another process has changed."""
        # NOTE: the old state is not closed: a search in another thread may still read it. Its
        # files are released when the last one lets go.
        if (self._path / MANIFEST_NAME).exists():
            self._index = Index.open(self._path, embedder=self._embedder)
        else:
            self._index = None

    def put(self, chunks: list[Chunk]) -> None:
        """Add documents of one chunk each; one with an id that the folder has replaces the old one.

        Raises
        ------
        RetrievalError
            The id of one chunk of a document that was ingested in several, or another process
            that changes the same folder.
        """
        # Embedding is the slow part and needs no lock.
        batches = [chunks[start : start + _BATCH] for start in range(0, len(chunks), _BATCH)]
        vectors = [
            self._embedder.encode_documents([chunk.text for chunk in batch]) for batch in batches
        ]
        with self._change:
            settings = self._settings()
            with IndexWriter(self._path, settings) as writer:
                for chunk in chunks:
                    # An id may name a chunk of a document that was ingested from a file.
                    writer.remove_document(self._document_of(chunk.id) or chunk.id)
                    writer.put_document(chunk.id, document_hash(_as_document(chunk), settings))
                for batch, found in zip(batches, vectors, strict=True):
                    writer.append(batch, found)
                writer.commit()
            self.reload()

    def remove(self, ids: Sequence[str] | None) -> None:
        """Remove documents by id, unknown ones passed over; None removes everything.

        Raises
        ------
        RetrievalError
            As for :meth:`put`.
        """
        with self._change:
            if self._index is None:
                return
            with IndexWriter(self._path, self._settings()) as writer:
                if ids is None:
                    removed = writer.document_ids()
                else:
                    removed = [name for name in map(self._document_of, ids) if name is not None]
                gone = [writer.remove_document(name) for name in dict.fromkeys(removed)]
                if any(gone):
                    writer.commit()
            self.reload()

    def chunks(self, ids: Sequence[str]) -> list[Chunk]:
        """Chunks with these ids, each once, in that order; unknown ids are passed over."""
        index = self._index
        found: list[Chunk] = []
        if index is None:
            return found
        for name in dict.fromkeys(ids):
            try:
                found.append(index.chunk(name))
            except RetrievalError:
                continue
        return found

    def nearest(
        self, vector: NDArray[np.float32], k: int, where: Mapping[str, object] | None
    ) -> list[SearchHit]:
        """Up to `k` chunks nearest to a vector, ``(dim,)`` float32 of unit length, best first."""
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise RetrievalError(f"k is {k!r}; it must be a whole number, at least 1")
        index = self._index
        return [] if index is None else index.search_vector(vector, k=k, where=where)

    def _settings(self) -> IndexSettings:
        """Settings of the folder where there is one: what was ingested there stays valid."""
        manifest = self._index.manifest if self._index is not None else None
        if (self._path / MANIFEST_NAME).exists():
            manifest = Manifest.read(self._path)
        return IndexSettings(
            embedder_name=self._embedder.name,
            embedder_fingerprint=self._embedder.fingerprint,
            dim=self._embedder.dim,
            splitter=manifest.splitter if manifest else {"kind": "langchain"},
            tokenizer_fingerprint=manifest.tokenizer_fingerprint if manifest else "",
            factory=None if manifest else self._factory,
            # LangChain users expect a vector of the text alone.
            include_title=manifest.include_title if manifest else False,
        )

    def _document_of(self, name: str) -> str | None:
        """Name of the document to remove for an id; None where there is nothing."""
        if self._index is None:
            return None
        try:
            chunk = self._index.chunk(name)
        except RetrievalError:
            return name
        if chunk.document_id != name:
            count = {record.id: record.num_chunks for record in self._index.documents()}
            if count[chunk.document_id] > 1:
                raise RetrievalError(
                    f"{name!r} is one of {count[chunk.document_id]} chunks of the document "
                    f"{chunk.document_id!r}; change the whole document by that id"
                )
        return chunk.document_id


def _as_document(chunk: Chunk) -> Document:
    return Document(
        id=chunk.document_id,
        text=chunk.text,
        title=chunk.title,
        path=chunk.path,
        metadata=chunk.metadata,
    )
