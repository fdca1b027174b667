"""Changes to an index, committed as a new generation in one step.

Everything new is staged on disk; :meth:`IndexWriter.commit` writes the next generation beside the
current one, replaces the manifest last, and only then removes the old files. Killed at any point,
the folder opens as the old state or as the new one.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from retrievers.bm25 import Bm25Builder
from retrievers.chunk_store import ChunkStore, ChunkWriter, encode_chunk, id_hash
from retrievers.columns import ColumnWriter, chunk_fields
from retrievers.dense import DenseIndex
from retrievers.errors import RetrievalError
from retrievers.faiss_factory import AUTO, choose_factory, create_index, set_options
from retrievers.generation import (
    BM25_NAME,
    DENSE_NAME,
    DOCUMENTS_NAME,
    IDS_NAME,
    KEY_BYTES,
    KEYS_NAME,
    LABELS_NAME,
    VECTORS_NAME,
    DocumentRecord,
    Generation,
)
from retrievers.index_store import check_embedder
from retrievers.journal import text_key
from retrievers.manifest import MANIFEST_NAME, Manifest, record_files
from retrievers.types import Chunk

logger = logging.getLogger(__name__)

LOCK_NAME = ".lock"
WORK_NAME = ".work"
_BLOCK_ROWS = 4096
_GROWTH_BEFORE_RETRAINING = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexSettings:
    """What decides the contents of an index besides the documents.

    Parameters
    ----------
    embedder_name, embedder_fingerprint, dim
        Model of the vectors.
    splitter
        Settings of the splitter, JSON values.
    tokenizer_fingerprint
        Tokenizer that measures chunks.
    factory
        FAISS factory string, or ``"auto"`` (:func:`choose_factory`); ``None`` keeps what the
        index has.
    search_options
        FAISS parameter string stored with the index; ``None`` keeps what the index has, or takes
        what goes with ``"auto"``.
    include_title
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


class IndexWriter:
    """The only way to change an index; holds its lock from construction to :meth:`close`.

    Parameters
    ----------
    folder
        Index folder, created where missing.
    settings
        Settings of the new state.

    Raises
    ------
    EmbedderMismatchError
        Where the folder holds an index of another embedder.
    RetrievalError
        Where another process changes the index, or a setting is not valid.
    """

    def __init__(self, folder: str | Path, settings: IndexSettings) -> None:
        self.folder = Path(folder)
        self.settings = settings
        _create_folder(self.folder)
        self._lock = FileLock(self.folder / LOCK_NAME, timeout=0)
        try:
            self._lock.acquire()
        except Timeout:
            raise RetrievalError(
                f"another process is changing the index {self.folder}; wait for it to end"
            ) from None
        self._stage: _Stage | None = None
        self.current: Generation | None = None
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        self.manifest: Manifest | None = None
        if (self.folder / MANIFEST_NAME).exists():
            self.manifest = Manifest.read(self.folder)
            check_embedder(
                self.folder,
                self.manifest,
                self.settings.embedder_name,
                self.settings.embedder_fingerprint,
            )
            self.manifest.check_files(self.folder, contents=True, skip=frozenset())
            self.current = Generation(self.folder / self.manifest.generation, self.manifest)
        factory = self.settings.factory
        if factory is not None and factory != AUTO:
            # A bad string must fail before hours of embedding, not after.
            set_options(
                create_index(self.settings.dim, factory), self.settings.search_options or ""
            )
        self._remove_leftovers()
        self._documents = {record.id: record for record in self._current_documents()}
        self._dropped: set[str] = set()
        self._key_order: NDArray[np.int64] | None = None
        self.work = self.folder / WORK_NAME
        stage = self.work / "stage"
        stage.mkdir(parents=True)
        self._stage = _Stage(stage, self.settings.dim)

    @property
    def num_rows(self) -> int:
        """Chunks of the current generation."""
        return self.current.num_rows if self.current is not None else 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the lock; staged changes that were not committed are forgotten."""
        if self._stage is not None:
            self._stage.abort()
            shutil.rmtree(self._stage.folder, ignore_errors=True)
            self._stage = None
        if self.current is not None:
            self.current.close()
            self.current = None
        self._lock.release()

    def document(self, document_id: str) -> DocumentRecord | None:
        """Look up what the index knows of a document, staged changes included."""
        return self._documents.get(document_id)

    def document_ids(self) -> list[str]:
        """Every document, staged changes included."""
        return list(self._documents)

    def known_rows(self, keys: Sequence[bytes]) -> NDArray[np.int64]:
        """Rows of the current generation that hold the vectors of these texts, -1 for none."""
        rows = np.full(len(keys), -1, dtype=np.int64)
        if self.current is None or not self.num_rows or not keys:
            return rows
        # Void bytes have no order in NumPy; two big-endian halves do.
        stored = self.current.keys.view(">u8").reshape(-1, 2)
        if self._key_order is None:
            self._key_order = np.argsort(stored[:, 0], kind="stable")
        wanted = np.frombuffer(b"".join(keys), dtype=">u8").reshape(-1, 2)
        sorted_halves = stored[:, 0]
        first = np.searchsorted(sorted_halves, wanted[:, 0], side="left", sorter=self._key_order)
        for position, start in enumerate(first.tolist()):
            while start < self.num_rows:
                row = int(self._key_order[start])
                if stored[row, 0] != wanted[position, 0]:
                    break
                if stored[row, 1] == wanted[position, 1]:
                    rows[position] = row
                    break
                start += 1
        return rows

    def known_vectors(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Vectors of rows of the current generation, ``(len(rows), dim)`` float32."""
        assert self.current is not None
        return np.array(self.current.vectors[rows])

    def put_document(self, document_id: str, content_hash: str) -> None:
        """Begin a new version of a document: its chunks of the old one go, others follow."""
        self._drop(document_id)
        self._documents[document_id] = DocumentRecord(
            id=document_id, content_hash=content_hash, num_chunks=0
        )

    def remove_document(self, document_id: str) -> bool:
        """Remove a document with its chunks; false where the index does not have it."""
        if document_id not in self._documents:
            return False
        self._drop(document_id)
        del self._documents[document_id]
        return True

    def append(self, chunks: Sequence[Chunk], vectors: NDArray[np.float32]) -> None:
        """Stage chunks of documents that were put before.

        Parameters
        ----------
        chunks
            With ids that no other chunk of the index has.
        vectors
            ``(len(chunks), dim)`` float32, unit length.
        """
        if vectors.shape != (len(chunks), self.settings.dim):
            raise RetrievalError(
                f"vectors of shape {vectors.shape} do not fit {len(chunks)} chunks of "
                f"{self.settings.dim} dimensions"
            )
        for chunk in chunks:
            record = self._documents.get(chunk.document_id)
            if record is None:
                raise RetrievalError(
                    f"chunk {chunk.id!r} belongs to document {chunk.document_id!r}, "
                    "which was not put before"
                )
            self._documents[record.id] = DocumentRecord(
                id=record.id, content_hash=record.content_hash, num_chunks=record.num_chunks + 1
            )
        assert self._stage is not None
        title = self.settings.include_title
        keys = [text_key(indexed_text(chunk, title)) for chunk in chunks]
        self._stage.append(chunks, vectors, keys)

    def commit(self, progress: Callable[[int, int], None] | None = None) -> Manifest:
        """Write the next generation and make it the current one; the writer is closed then.

        Parameters
        ----------
        progress
            Called with rows written and rows in total.

        Returns
        -------
        Manifest
            Of the new generation, or of the current one where nothing was to change.
        """
        assert self._stage is not None
        choice = self._choose()
        if self._is_unchanged(choice):
            assert self.manifest is not None
            manifest = self.manifest
            self.close()
            return manifest
        number = 1
        if self.manifest is not None:
            number = int(self.manifest.generation.rsplit("-", 1)[1]) + 1
        target = self.folder / f"gen-{number:06d}"
        target.mkdir()
        try:
            manifest = self._write_generation(target, choice, progress)
        except BaseException:
            shutil.rmtree(target, ignore_errors=True)
            raise
        manifest.write(self.folder)
        if self.manifest is not None:
            # Readers that have the old files open or mapped keep them until they close.
            shutil.rmtree(self.folder / self.manifest.generation, ignore_errors=True)
        self.close()
        shutil.rmtree(self.work, ignore_errors=True)
        return manifest

    # -- the parts of a commit ---------------------------------------------------------------

    def _kept(self) -> NDArray[np.int64]:
        if self.current is None:
            return np.empty(0, dtype=np.int64)
        return np.flatnonzero(~self.current.rows_of_documents(self._dropped))

    def _choose(self) -> tuple[str, str, str]:
        """Return the factory as requested, as resolved, and its search options."""
        assert self._stage is not None
        old, settings = self.manifest, self.settings
        requested = settings.factory or (old.factory_requested if old else AUTO)
        same = old is not None and requested == old.factory_requested
        if requested != AUTO:
            options = old.search_options if old is not None and same else ""
            factory = requested
        else:
            rows = len(self._kept()) + self._stage.num_rows
            choice = choose_factory(rows)
            factory, options = choice.factory, choice.search_options
            # A trained index stays while it fits roughly; training anew at every step does not pay.
            if old is not None and same and old.num_trained and factory.startswith("IVF"):
                ratio = rows / old.num_trained
                if 1 / _GROWTH_BEFORE_RETRAINING < ratio < _GROWTH_BEFORE_RETRAINING:
                    factory, options = old.factory, old.search_options
        if settings.search_options is not None:
            options = settings.search_options
        return requested, factory, options

    def _is_unchanged(self, choice: tuple[str, str, str]) -> bool:
        old, settings = self.manifest, self.settings
        assert self._stage is not None
        return (
            old is not None
            and not self._dropped
            and not self._stage.num_rows
            and len(self._documents) == old.num_documents
            and choice == (old.factory_requested, old.factory, old.search_options)
            and dict(settings.splitter) == dict(old.splitter)
            and settings.tokenizer_fingerprint == old.tokenizer_fingerprint
            and settings.include_title == old.include_title
        )

    def _write_generation(
        self,
        target: Path,
        choice: tuple[str, str, str],
        progress: Callable[[int, int], None] | None,
    ) -> Manifest:
        requested, factory, options = choice
        stage = self._stage
        assert stage is not None
        stage.finish()
        kept = self._kept()
        first_label = self.manifest.next_label if self.manifest is not None else 0
        total = len(kept) + stage.num_rows
        self._write_rows(target, kept, progress)
        new_labels = np.arange(first_label, first_label + stage.num_rows, dtype=np.int64)
        old_labels = (
            self.current.labels[kept] if self.current is not None else np.empty(0, dtype=np.int64)
        )
        np.concatenate([old_labels, new_labels]).astype("<i8").tofile(target / LABELS_NAME)
        num_trained = self._write_dense(target, factory, options, kept, new_labels)
        with (target / DOCUMENTS_NAME).open("w", encoding="ascii") as file:
            for record in self._documents.values():
                fields = {
                    "id": record.id,
                    "content_hash": record.content_hash,
                    "num_chunks": record.num_chunks,
                }
                file.write(json.dumps(fields) + "\n")
        settings = self.settings
        return Manifest(
            generation=target.name,
            embedder_name=settings.embedder_name,
            embedder_fingerprint=settings.embedder_fingerprint,
            dim=settings.dim,
            factory_requested=requested,
            factory=factory,
            search_options=options,
            splitter=dict(settings.splitter),
            tokenizer_fingerprint=settings.tokenizer_fingerprint,
            include_title=settings.include_title,
            num_documents=len(self._documents),
            num_chunks=total,
            num_trained=num_trained,
            next_label=first_label + stage.num_rows,
            files=record_files(target),
        )

    def _write_rows(
        self,
        target: Path,
        kept: NDArray[np.int64],
        progress: Callable[[int, int], None] | None,
    ) -> None:
        """Chunks, columns, BM25, vectors, keys and ids: first the rows that stay, then the new."""
        stage, current = self._stage, self.current
        assert stage is not None
        total = len(kept) + stage.num_rows
        chunks = ChunkWriter(target)
        columns = ColumnWriter()
        bm25 = Bm25Builder(target / BM25_NAME, current.bm25 if current is not None else None)
        hashes: list[NDArray[np.uint64]] = []
        done = 0
        try:
            with (
                (target / VECTORS_NAME).open("wb") as vectors,
                (target / KEYS_NAME).open("wb") as keys,
            ):
                sources: list[tuple[ChunkStore, Any, Any, NDArray[np.int64], bool]] = []
                if current is not None:
                    sources.append((current.chunks, current.vectors, current.keys, kept, False))
                sources.append((*stage.opened(), np.arange(stage.num_rows), True))
                for store, source_vectors, source_keys, rows, is_new in sources:
                    if not is_new and current is not None:
                        bm25.copy(current.bm25, rows)
                    for block in _blocks(rows):
                        chunks.append(store.line(int(row)) for row in block)
                        read = list(store.chunks(block))
                        columns.append([chunk_fields(chunk) for chunk in read])
                        if is_new:
                            title = self.settings.include_title
                            bm25.append([indexed_text(chunk, title) for chunk in read])
                        vectors.write(source_vectors[block].tobytes())
                        keys.write(source_keys[block].tobytes())
                        hashes.append(np.array([id_hash(c.id) for c in read], dtype=np.uint64))
                        done += len(block)
                        if progress is not None:
                            progress(done, total)
            chunks.close()
            columns.write(target)
            bm25.finish()
        except BaseException:
            chunks.abort()
            bm25.abort()
            raise
        every = np.concatenate(hashes) if hashes else np.empty(0, dtype=np.uint64)
        every.astype("<u8").tofile(target / IDS_NAME)
        distinct, counts = np.unique(every, return_counts=True)
        if len(distinct) != len(every):
            row = int(np.flatnonzero(every == distinct[counts > 1][0])[-1])
            store = ChunkStore(target, total)
            chunk = store.chunk(row)
            store.close()
            raise RetrievalError(
                f"chunk id {chunk.id!r} occurs twice, the second time in document "
                f"{chunk.document_id!r}; chunk ids must be distinct"
            )

    def _write_dense(
        self,
        target: Path,
        factory: str,
        options: str,
        kept: NDArray[np.int64],
        new_labels: NDArray[np.int64],
    ) -> int:
        """Write the FAISS index and return the number of vectors it was trained on."""
        total = len(kept) + len(new_labels)
        vectors = _read_vectors(target / VECTORS_NAME, total, self.settings.dim)
        old = self.manifest
        if old is not None and self.current is not None and old.factory == factory:
            outgrown = old.num_trained and total > old.num_trained * _GROWTH_BEFORE_RETRAINING
            removed = np.setdiff1d(np.arange(self.num_rows), kept, assume_unique=True)
            dense = DenseIndex.load(self.current.folder / DENSE_NAME, factory, mmap=False)
            # Graph indexes cannot delete: they are built anew from the stored vectors, which
            # costs no embedding. So is an index that grew far beyond what it was trained on.
            if not outgrown and (not len(removed) or dense.can_remove):
                if len(removed):
                    dense.remove(np.array(self.current.labels[removed]))
                for start in range(0, len(new_labels), _BLOCK_ROWS):
                    stop = min(start + _BLOCK_ROWS, len(new_labels))
                    block = vectors[len(kept) + start : len(kept) + stop]
                    dense.add(new_labels[start:stop], block)
                dense.save(target / DENSE_NAME)
                return old.num_trained
            del dense
        labels = np.fromfile(target / LABELS_NAME, dtype="<i8")
        built = DenseIndex.build(vectors, labels, factory)
        built.save(target / DENSE_NAME)
        set_options(create_index(self.settings.dim, factory), options)
        return total if built.needs_training else 0

    # -- house-keeping -----------------------------------------------------------------------

    def _drop(self, document_id: str) -> None:
        # Chunks staged in this very session would have to be found and unstaged.
        assert self._stage is not None
        if document_id in self._stage.document_ids:
            raise RetrievalError(
                f"document id {document_id!r} occurs twice in one ingest; ids must be distinct"
            )
        if document_id in self._documents:
            self._dropped.add(document_id)

    def _current_documents(self) -> Iterable[DocumentRecord]:
        return self.current.documents() if self.current is not None else ()

    def _remove_leftovers(self) -> None:
        """Clear what a killed process left: generations never committed, staged files."""
        keep = self.manifest.generation if self.manifest is not None else None
        for path in self.folder.glob("gen-*"):
            if path.name != keep:
                shutil.rmtree(path, ignore_errors=True)
        shutil.rmtree(self.folder / WORK_NAME / "stage", ignore_errors=True)
        (self.folder / MANIFEST_NAME).with_suffix(".json.new").unlink(missing_ok=True)


class _Stage:
    """New chunks and vectors on disk until the commit."""

    def __init__(self, folder: Path, dim: int) -> None:
        self.folder = folder
        self.num_rows = 0
        self.document_ids: set[str] = set()
        self._dim = dim
        self._chunks = ChunkWriter(folder)
        self._vectors = (folder / VECTORS_NAME).open("wb")
        self._keys = (folder / KEYS_NAME).open("wb")

    def append(
        self, chunks: Sequence[Chunk], vectors: NDArray[np.float32], keys: Sequence[bytes]
    ) -> None:
        self._chunks.append(encode_chunk(chunk) for chunk in chunks)
        self._vectors.write(np.ascontiguousarray(vectors, dtype="<f4").tobytes())
        self._keys.write(b"".join(keys))
        self.document_ids.update(chunk.document_id for chunk in chunks)
        self.num_rows += len(chunks)

    def finish(self) -> None:
        self._chunks.close()
        self._vectors.close()
        self._keys.close()

    def abort(self) -> None:
        self._chunks.abort()
        self._vectors.close()
        self._keys.close()

    def opened(self) -> tuple[ChunkStore, NDArray[np.float32], NDArray[np.void]]:
        vectors = _read_vectors(self.folder / VECTORS_NAME, self.num_rows, self._dim)
        keys = np.fromfile(self.folder / KEYS_NAME, dtype=f"V{KEY_BYTES}")
        return ChunkStore(self.folder, self.num_rows), vectors, keys


def _read_vectors(path: Path, rows: int, dim: int) -> NDArray[np.float32]:
    if not rows:
        return np.empty((0, dim), dtype=np.float32)
    return np.memmap(path, dtype="<f4", mode="r", shape=(rows, dim))


def _blocks(rows: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    for start in range(0, len(rows), _BLOCK_ROWS):
        yield rows[start : start + _BLOCK_ROWS]


def _create_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise RetrievalError(f"{folder} is a file; name a folder for the index") from None
    except OSError as exc:
        raise RetrievalError(f"cannot create the index folder {folder}: {exc.strerror}") from exc
