"""Changes to an index, committed as a new generation in one step.

Everything new is staged on disk; :meth:`IndexWriter.commit` writes the next generation beside the
current one, makes all of it safe on the disk, replaces the manifest last, and only then removes the
old files. Killed at any point, or without power, the folder opens as the old state or as the new one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from retrievers.chunk_texts import encode_chunk
from retrievers.dense_update import DensePlan, plan_dense
from retrievers.documents import DocumentRecord
from retrievers.durable import make_folders, remove_tree, storage_faults, sync_folder
from retrievers.errors import RetrievalError, StorageError
from retrievers.faiss_factory import AUTO, create_index, set_options
from retrievers.generation import Generation
from retrievers.generation_writer import write_generation
from retrievers.index_lock import STAGE_NAME, WORK_NAME, locked
from retrievers.index_settings import IndexSettings, indexed_text
from retrievers.index_store import check_embedder
from retrievers.journal import JOURNAL_NAME, half_shards, text_key
from retrievers.manifest import MANIFEST_NAME, NEW_MANIFEST_NAME, Manifest
from retrievers.old_generations import next_folder, remove_old
from retrievers.removal import Erase
from retrievers.row_files import RowFiles, RowWriter
from retrievers.types import Chunk

logger = logging.getLogger(__name__)


class IndexWriter:
    """The only way to change an index; holds its lock from construction to :meth:`close`.

    Parameters
    ----------
    folder : str or Path
        Index folder, created where missing.
    settings : IndexSettings
        Settings of the new state.
    erase : Erase, optional
        Called with the chunks that a change removed, see :mod:`retrievers.removal`.

    Raises
    ------
    EmbedderMismatchError
        Where the folder holds an index of another embedder.
    StorageError
        Where the disk refuses.
    IndexBusyError
        Where another process changes the index.
    RetrievalError
        Where a setting is not valid.
    """

    def __init__(
        self, folder: str | Path, settings: IndexSettings, *, erase: Erase | None = None
    ) -> None:
        self.folder = Path(folder)
        self.settings = settings
        self._erase = erase
        self.work = self.folder / WORK_NAME
        self._stage: RowWriter | None = None
        self.current: Generation | None = None
        _create_folder(self.folder)
        with self._writing():
            self._lock = locked(self.folder)
        try:
            with self._writing():
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
        try:
            self._retire({})
        except StorageError as error:
            # It keeps: the files stay and name what is to be erased.
            logger.warning("%s", error)
        current = self.current.documents() if self.current is not None else ()
        self._documents = {record.id: record for record in current}
        self._dropped: set[str] = set()
        self._staged_documents: set[str] = set()
        stage = self.work / STAGE_NAME
        make_folders(stage)
        self._stage = RowWriter(stage)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the lock; staged changes that were not committed are forgotten."""
        try:
            if self._stage is not None:
                self._stage.abort()
                self._stage = None
            with suppress(OSError):  # the next writer tries again, and says so
                remove_tree(self.work / STAGE_NAME)
            if self.current is not None:
                self.current.close()
                self.current = None
        finally:
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
        chunks : sequence of Chunk
            With ids that no other chunk of the index has.
        vectors : ndarray
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
        with self._writing():
            self._stage.append((encode_chunk(chunk) for chunk in chunks), vectors, keys)
        self._staged_documents.update(chunk.document_id for chunk in chunks)

    def commit(self, progress: Callable[[int, int], None] | None = None) -> Manifest:
        """Write the next generation and make it the current one; the writer is closed then.

        Parameters
        ----------
        progress : callable, optional
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
        if self.manifest is not None and self._is_unchanged(self.manifest, plan):
            self.close()
            return self.manifest
        with self._writing():
            manifest = self._write(stage, plan, kept, progress)
        dropped = {}
        if self.current is not None:
            rows = np.flatnonzero(self.current.rows_of_documents(self._dropped))
            dropped[self.current.folder.name] = rows
        self.manifest = manifest
        self._retire(dropped)
        self.close()
        return manifest

    def _write(
        self,
        stage: RowWriter,
        plan: DensePlan,
        kept: NDArray[np.int64],
        progress: Callable[[int, int], None] | None,
    ) -> Manifest:
        """Write the next generation beside the current one, and name it in the manifest."""
        target = next_folder(self.folder, self.manifest)
        target.mkdir(mode=0o700)
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
            manifest.write(self.folder)
        except BaseException:
            # An interrupt may come when the manifest names it already.
            if not self._is_named(target.name):
                with suppress(OSError):
                    remove_tree(target)
            raise
        return manifest

    def _is_named(self, generation: str) -> bool:
        """Whether the manifest on the disk names a generation; in doubt, yes."""
        try:
            return Manifest.read(self.folder).generation == generation
        except RetrievalError:
            return (self.folder / MANIFEST_NAME).exists()

    def _retire(self, dropped: Mapping[str, NDArray[np.int64]]) -> None:
        """Remove the files of every state but the current one, and first what was made of their texts.

        Parameters
        ----------
        dropped : mapping of str to ndarray
            Rows that are gone, by generation; where a process was killed they have to be found.
        """
        with storage_faults(
            f"the old files of the index {self.folder} cannot be removed",
            state="what is deleted is not found any more, but may lie on the disk",
        ):
            # What is removed now is needed no more only if the manifest survives a power cut.
            sync_folder(self.folder)
            gone = remove_old(self.folder, self.manifest, dropped, self._erase)
            (self.folder / NEW_MANIFEST_NAME).unlink(missing_ok=True)
            for part in half_shards(self.work / JOURNAL_NAME):
                part.unlink(missing_ok=True)
            # After a commit nothing is left to resume.
            remove_tree(self.work / STAGE_NAME if self._stage is None else self.work)
            if gone:
                sync_folder(self.folder)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        with storage_faults(
            f"the index {self.folder} cannot be written", state="the index is as it was"
        ):
            yield

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
            and (self.current is None or self.current.is_current)
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


def _create_folder(folder: Path) -> None:
    try:
        make_folders(folder)
    except (FileExistsError, NotADirectoryError):
        raise RetrievalError(f"{folder} is a file; name a folder for the index") from None
    except OSError as exc:
        raise StorageError(
            f"cannot create the index folder {folder}: {exc.strerror}", exc.errno
        ) from exc
