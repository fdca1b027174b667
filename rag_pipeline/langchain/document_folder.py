"""An index folder whose documents come and go by id, and are read and found meanwhile.

Takes and gives chunks; what LangChain makes of them is :mod:`.vector_store`'s matter.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rag_pipeline.erasure import make_eraser
from rag_pipeline.sglang_plugin import FusionConfig
from retrievers import (
    Index,
    IndexSettings,
    IndexWriter,
    LiveIndex,
    RetrievalError,
    TextEmbedder,
)
from retrievers.index_settings import document_hash
from retrievers.types import Chunk, Document, SearchHit

DEFAULT_BATCH = 512
"""Texts embedded at a time."""


class DocumentFolder:
    """One index folder, changed by one thread at a time while others read the last whole state.

    Every call sees what other objects and processes have written until then.

    Parameters
    ----------
    path : Path
        Index folder, created with the first document.
    embedder : TextEmbedder
        Model of the index.
    factory : str, optional
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
        fusion = FusionConfig.from_env()
        self._erase = make_eraser(*fusion.store_folders(), remote=fusion.remote)
        self._live = LiveIndex(path, embedder=embedder)
        self._live.current()

    def __len__(self) -> int:
        """Chunks in the folder."""
        index = self._live.current()
        return 0 if index is None else len(index)

    def check(self) -> None:
        """Open the folder anew and compare every file with its checksum."""
        self._live.check()

    def put(self, chunks: list[Chunk], *, batch_size: int = DEFAULT_BATCH) -> None:
        """Add documents of one chunk each; one with an id that the folder has replaces the old one.

        Parameters
        ----------
        chunks : list of Chunk
            With distinct ids.
        batch_size : int
            Texts embedded at a time.

        Raises
        ------
        RetrievalError
            The id of one chunk of a document that was ingested in several, or another process
            that changes the same folder.
        """
        # Embedding is the slow part and needs no lock.
        starts = range(0, len(chunks), batch_size)
        batches = [chunks[start : start + batch_size] for start in starts]
        vectors = [
            self._embedder.encode_documents([chunk.text for chunk in batch]) for batch in batches
        ]
        with self._change:
            settings = self._settings()
            with IndexWriter(self._path, settings, erase=self._erase) as writer:
                # The writer's lock is held: what is current now stays so until the commit.
                index = self._live.current()
                for chunk in chunks:
                    # An id may name a chunk of a document that was ingested from a file.
                    writer.remove_document(_document_of(index, chunk.id) or chunk.id)
                    writer.put_document(chunk.id, document_hash(_as_document(chunk), settings))
                for batch, found in zip(batches, vectors, strict=True):
                    writer.append(batch, found)
                writer.commit()

    def remove(self, ids: Sequence[str] | None) -> None:
        """Remove documents by id, unknown ones passed over; None removes everything.

        Raises
        ------
        RetrievalError
            As for :meth:`put`.
        """
        with self._change:
            if self._live.current() is None:
                return
            with IndexWriter(self._path, self._settings(), erase=self._erase) as writer:
                index = self._live.current()
                if ids is None:
                    removed = writer.document_ids()
                else:
                    found = [_document_of(index, name) for name in ids]
                    removed = [name for name in found if name is not None]
                gone = [writer.remove_document(name) for name in dict.fromkeys(removed)]
                if any(gone):
                    writer.commit()

    def chunks(self, ids: Sequence[str]) -> list[Chunk]:
        """Chunks with these ids, each once, in that order; unknown ids are passed over."""
        index = self._live.current()
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
        index = self._live.current()
        return [] if index is None else index.search_vector(vector, k=k, where=where)

    def _settings(self) -> IndexSettings:
        """Settings of the folder where there is one: what was ingested there stays valid."""
        index = self._live.current()
        if index is not None:
            # It was opened with this embedder: the model is the folder's, maybe by another name.
            return dataclasses.replace(index.manifest.settings, embedder_name=self._embedder.name)
        return IndexSettings(
            embedder_name=self._embedder.name,
            embedder_fingerprint=self._embedder.fingerprint,
            dim=self._embedder.dim,
            splitter={"kind": "langchain"},
            tokenizer_fingerprint="",
            factory=self._factory,
            # LangChain users expect a vector of the text alone.
            include_title=False,
        )


def _document_of(index: Index | None, name: str) -> str | None:
    """Name of the document to remove for an id; None where there is nothing."""
    if index is None:
        return None
    try:
        chunk = index.chunk(name)
    except RetrievalError:
        return name
    if chunk.document_id != name:
        count = {record.id: record.num_chunks for record in index.documents()}
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
