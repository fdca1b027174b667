"""Changes to an index, committed as a new generation in one step.

Everything new is staged on disk; :meth:`IndexWriter.commit` writes the next generation beside the
current one, replaces the manifest last, and only then removes the old files. Killed at any point,
the folder opens as the old state or as the new one.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Self

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from retrievers.chunk_store import encode_chunk
from retrievers.dense_update import DensePlan, plan_dense
from retrievers.errors import RetrievalError
from retrievers.faiss_factory import AUTO, create_index, set_options
from retrievers.generation import DocumentRecord, Generation
from retrievers.generation_writer import write_generation
from retrievers.index_settings import IndexSettings, indexed_text
from retrievers.index_store import check_embedder
from retrievers.journal import text_key
from retrievers.manifest import MANIFEST_NAME, Manifest
from retrievers.row_files import RowFiles, RowWriter
from retrievers.types import Chunk

LOCK_NAME = ".lock"
WORK_NAME = ".work"


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
        self._stage: RowWriter | None = None
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
        current = self.current.documents() if self.current is not None else ()
        self._documents = {record.id: record for record in current}
        self._dropped: set[str] = set()
        self._staged_documents: set[str] = set()
        self.work = self.folder / WORK_NAME
        stage = self.work / "stage"
        stage.mkdir(parents=True)
        self._stage = RowWriter(stage)

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
        keys = b"".join(text_key(indexed_text(chunk, title)) for chunk in chunks)
        self._stage.append((encode_chunk(chunk) for chunk in chunks), vectors, keys)
        self._staged_documents.update(chunk.document_id for chunk in chunks)

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
        stage = self._stage
        assert stage is not None
        kept = self._kept_rows()
        plan = plan_dense(self.settings, self.manifest, len(kept) + stage.num_rows)
        number = 1
        if self.manifest is not None:
            if self._is_unchanged(self.manifest, plan):
                self.close()
                return self.manifest
            number = int(self.manifest.generation.rsplit("-", 1)[1]) + 1
        target = self.folder / f"gen-{number:06d}"
        target.mkdir()
        try:
            stage.finish()
            with closing(RowFiles(stage.folder, stage.num_rows, self.settings.dim)) as staged:
                manifest = write_generation(
                    target,
                    settings=self.settings,
                    plan=plan,
                    current=self.current,
                    kept=kept,
                    staged=staged,
                    documents=self._documents.values(),
                    progress=progress,
                )
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

    def _kept_rows(self) -> NDArray[np.int64]:
        """Rows of the current generation whose documents stay as they are."""
        if self.current is None:
            return np.empty(0, dtype=np.int64)
        return np.flatnonzero(~self.current.rows_of_documents(self._dropped))

    def _is_unchanged(self, old: Manifest, plan: DensePlan) -> bool:
        settings = self.settings
        assert self._stage is not None
        return (
            not self._dropped
            and not self._stage.num_rows
            and len(self._documents) == old.num_documents
            and plan == DensePlan.of(old)
            and dict(settings.splitter) == dict(old.splitter)
            and settings.tokenizer_fingerprint == old.tokenizer_fingerprint
            and settings.include_title == old.include_title
        )

    def _drop(self, document_id: str) -> None:
        # Chunks staged in this very session would have to be found and unstaged.
        if document_id in self._staged_documents:
            raise RetrievalError(
                f"document id {document_id!r} occurs twice in one ingest; ids must be distinct"
            )
        if document_id in self._documents:
            self._dropped.add(document_id)

    def _remove_leftovers(self) -> None:
        """Clear what a killed process left: generations never committed, staged files."""
        keep = self.manifest.generation if self.manifest is not None else None
        for path in self.folder.glob("gen-*"):
            if path.name != keep:
                shutil.rmtree(path, ignore_errors=True)
        shutil.rmtree(self.folder / WORK_NAME / "stage", ignore_errors=True)
        (self.folder / MANIFEST_NAME).with_suffix(".json.new").unlink(missing_ok=True)


def _create_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise RetrievalError(f"{folder} is a file; name a folder for the index") from None
    except OSError as exc:
        raise RetrievalError(f"cannot create the index folder {folder}: {exc.strerror}") from exc
