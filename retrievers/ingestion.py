"""Documents into an index: split, embed what is new, commit; resumable and bounded in memory."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from retrievers.embedding import Embedder, TextEmbedder
from retrievers.errors import RetrievalError
from retrievers.index_settings import IndexSettings, document_hash, indexed_text, settings_mark
from retrievers.index_writer import WORK_NAME, IndexWriter
from retrievers.journal import EmbeddingJournal, text_key
from retrievers.manifest import Manifest
from retrievers.types import Chunk, Document

logger = logging.getLogger(__name__)

WINDOW_CHUNKS = 2048
"""Chunks sorted by length together; all that is held in memory of the corpus at a time."""
SHARD_CHUNKS = 128
"""Embeddings a shard of the journal holds, which is what an interruption can lose."""


class Fingerprinted(Protocol):
    """Anything with an identity, here the tokenizer of a splitter."""

    @property
    def fingerprint(self) -> str:
        """Equal fingerprints promise equal results."""
        ...


class Splitter(Protocol):
    """What ingestion needs of a splitter; :class:`retrievers.TokenSplitter` is one."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """Everything that decides the chunks, as JSON values."""
        ...

    @property
    def tokenizer(self) -> Fingerprinted:
        """The tokenizer that measures the chunks."""
        ...

    def split(self, document: Document) -> Sequence[Chunk]:
        """Chunks of a document, in order."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class IngestProgress:
    """Where an ingest stands.

    Parameters
    ----------
    stage
        ``"embed"`` while documents are read, split and embedded; ``"write"`` during the commit.
    documents, chunks
        Seen so far; chunks only of new and changed documents.
    embedded, reused
        Chunks whose vectors were computed, and taken from the index or an interrupted run.
    written, total
        Rows written and to write, in stage ``"write"``.
    """

    stage: str
    documents: int
    chunks: int
    embedded: int
    reused: int
    written: int = 0
    total: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class IngestReport:
    """What an ingest did.

    Parameters
    ----------
    documents_added, documents_changed, documents_unchanged, documents_removed
        Counts of documents.
    chunks_total
        Chunks of the index now.
    chunks_embedded
        Texts that went through the embedder.
    chunks_reused
        Texts of new or changed documents whose vector the index had, or that occurred twice.
    chunks_resumed
        Texts whose vector an interrupted run had left.
    chunks_truncated
        Embedded texts longer than the embedder reads; what lies behind does not count in dense
        search.
    embed_s, total_s
        Seconds in the embedder and in all.
    factory
        FAISS factory of the index.
    changed
        Whether a new generation was written.
    """

    documents_added: int
    documents_changed: int
    documents_unchanged: int
    documents_removed: int
    chunks_total: int
    chunks_embedded: int
    chunks_reused: int
    chunks_resumed: int
    chunks_truncated: int
    embed_s: float
    total_s: float
    factory: str
    changed: bool


@dataclass(kw_only=True, slots=True)
class _Counts:
    added: int = 0
    changed: int = 0
    unchanged: int = 0
    removed: int = 0
    chunks: int = 0
    embedded: int = 0
    reused: int = 0
    resumed: int = 0
    truncated: int = 0
    embed_s: float = 0.0
    seen: set[str] = field(default_factory=set)


def ingest(
    documents: Iterable[Document],
    index_dir: str | Path,
    *,
    splitter: Splitter,
    embedder: TextEmbedder,
    factory: str | None = None,
    search_options: str | None = None,
    include_title: bool = True,
    sync: bool = False,
    progress: Callable[[IngestProgress], None] | None = None,
) -> IngestReport:
    """Bring an index up to date with documents.

    Unchanged documents are skipped, changed ones replaced, new ones added. A text that the index
    or an interrupted run has embedded is not embedded again. The index stays usable as it was
    until the last step; interrupted (even killed), the next call resumes.

    Parameters
    ----------
    documents
        Read once, one at a time.
    index_dir
        Index folder, created where missing.
    splitter
        Cuts documents into chunks.
    embedder
        Model; must be the one of the index where there is one.
    factory
        FAISS factory string, or ``"auto"``; ``None`` keeps what the index has (``"auto"`` for a
        new one).
    search_options
        FAISS parameter string stored with the index, such as ``"nprobe=32"``.
    include_title
        Embed and match the title together with the text.
    sync
        Also remove documents of the index that are not among `documents`.
    progress
        Called after every step.

    Returns
    -------
    IngestReport

    Raises
    ------
    RetrievalError
        Where `documents` is empty and the index new, an id occurs twice, another process changes
        the index, or a setting is not valid.
    EmbedderMismatchError
        Where the index was built with another embedder.
    """
    started = time.perf_counter()
    settings = IndexSettings(
        embedder_name=embedder.name,
        embedder_fingerprint=embedder.fingerprint,
        dim=embedder.dim,
        splitter=dict(splitter.settings),
        tokenizer_fingerprint=splitter.tokenizer.fingerprint,
        factory=factory,
        search_options=search_options,
        include_title=include_title,
    )
    with IndexWriter(index_dir, settings) as writer:
        before = writer.manifest
        journal = EmbeddingJournal(
            writer.folder / WORK_NAME / "journal", embedder.fingerprint, embedder.dim
        )
        run = _Run(writer, journal, embedder, splitter, settings, progress)
        run.read(documents)
        if sync:
            run.remove_unseen()
        else:
            _refuse_mixed_settings(before, settings, run, writer)
        if not writer.document_ids() and before is None:
            raise RetrievalError("there is nothing to ingest: no document was found")
        manifest = writer.commit(run.report_writing if progress is not None else None)
    counts = run.counts
    if counts.truncated:
        logger.warning(
            "%d of %d chunks are longer than the embedder %s reads; use smaller chunks",
            counts.truncated,
            counts.embedded,
            embedder.name,
        )
    return IngestReport(
        documents_added=counts.added,
        documents_changed=counts.changed,
        documents_unchanged=counts.unchanged,
        documents_removed=counts.removed,
        chunks_total=manifest.num_chunks,
        chunks_embedded=counts.embedded,
        chunks_reused=counts.reused,
        chunks_resumed=counts.resumed,
        chunks_truncated=counts.truncated,
        embed_s=counts.embed_s,
        total_s=time.perf_counter() - started,
        factory=manifest.factory,
        changed=before is None or manifest.generation != before.generation,
    )


def delete_documents(index_dir: str | Path, document_ids: Sequence[str]) -> int:
    """Remove documents from an index, without its embedder.

    Parameters
    ----------
    index_dir
        Index folder.
    document_ids
        Documents to remove; every one must be in the index.

    Returns
    -------
    int
        Chunks that went with them.
    """
    manifest = Manifest.read(Path(index_dir))
    settings = IndexSettings(
        embedder_name=manifest.embedder_name,
        embedder_fingerprint=manifest.embedder_fingerprint,
        dim=manifest.dim,
        splitter=manifest.splitter,
        tokenizer_fingerprint=manifest.tokenizer_fingerprint,
        include_title=manifest.include_title,
    )
    with IndexWriter(index_dir, settings) as writer:
        for document_id in dict.fromkeys(document_ids):
            if not writer.remove_document(document_id):
                raise RetrievalError(f"the index {index_dir} holds no document {document_id!r}")
        return manifest.num_chunks - writer.commit().num_chunks


def _refuse_mixed_settings(
    before: Manifest | None, settings: IndexSettings, run: _Run, writer: IndexWriter
) -> None:
    """Documents outside this ingest cannot be split anew: their text is not here."""
    if before is None:
        return
    mark = settings_mark(settings)
    stale = [
        document_id
        for document_id in writer.document_ids()
        if document_id not in run.counts.seen
        and not str(getattr(writer.document(document_id), "content_hash", "")).startswith(mark)
    ]
    if stale:
        raise RetrievalError(
            f"{len(stale)} documents of the index (such as {stale[0]!r}) were split with other "
            "settings and are not among these; ingest them together, drop them with sync, or use "
            "a new folder"
        )


class _Run:
    """One pass over the documents, a window of chunks at a time."""

    def __init__(
        self,
        writer: IndexWriter,
        journal: EmbeddingJournal,
        embedder: TextEmbedder,
        splitter: Splitter,
        settings: IndexSettings,
        progress: Callable[[IngestProgress], None] | None,
    ) -> None:
        self._writer = writer
        self._journal = journal
        self._embedder = embedder
        self._splitter = splitter
        self._settings = settings
        self._progress = progress
        self._left_by_earlier_run = journal.snapshot()
        self._window: list[Chunk] = []
        self.counts = _Counts()

    def read(self, documents: Iterable[Document]) -> None:
        """Take in every document."""
        counts = self.counts
        for document in documents:
            if document.id in counts.seen:
                raise RetrievalError(
                    f"document id {document.id!r} occurs twice; ids must be distinct"
                )
            counts.seen.add(document.id)
            digest = document_hash(document, self._settings)
            known = self._writer.document(document.id)
            if known is not None and known.content_hash == digest:
                counts.unchanged += 1
                self._report()
                continue
            if known is None:
                counts.added += 1
            else:
                counts.changed += 1
            self._writer.put_document(document.id, digest)
            for chunk in self._splitter.split(document):
                self._window.append(chunk)
                counts.chunks += 1
                if len(self._window) >= WINDOW_CHUNKS:
                    self._flush()
            self._report()
        self._flush()

    def remove_unseen(self) -> None:
        """Remove what the index has and this pass did not meet."""
        for document_id in self._writer.document_ids():
            if document_id not in self.counts.seen:
                self._writer.remove_document(document_id)
                self.counts.removed += 1

    def report_writing(self, written: int, total: int) -> None:
        """Pass on the progress of the commit."""
        self._report(stage="write", written=written, total=total)

    def _flush(self) -> None:
        if not self._window:
            return
        window, self._window = self._window, []
        texts = [indexed_text(chunk, self._settings.include_title) for chunk in window]
        keys = [text_key(text) for text in texts]
        vectors = np.empty((len(window), self._embedder.dim), dtype=np.float32)
        rows = np.full(len(keys), -1, dtype=np.int64)
        if self._writer.current is not None:
            rows = self._writer.current.rows_of_keys(keys)
            stored = np.flatnonzero(rows >= 0)
            vectors[stored] = self._writer.current.vectors[rows[stored]]
        missing = {
            keys[i]: texts[i] for i in np.flatnonzero(rows < 0) if keys[i] not in self._journal
        }
        resumed = sum(1 for i in np.flatnonzero(rows < 0) if keys[i] in self._left_by_earlier_run)
        self.counts.resumed += resumed
        self.counts.reused += len(window) - len(missing) - resumed
        self._report()
        self._embed(missing)
        from_journal = np.flatnonzero(rows < 0)
        if len(from_journal):
            vectors[from_journal] = self._journal.vectors([keys[i] for i in from_journal])
        self._writer.append(window, vectors)

    def _embed(self, texts: Mapping[bytes, str]) -> None:
        # Texts of like length together, so that little padding is computed; longest first, so
        # that a batch that does not fit in memory fails at once.
        order = sorted(texts, key=lambda key: -len(texts[key]))
        for start in range(0, len(order), SHARD_CHUNKS):
            keys = order[start : start + SHARD_CHUNKS]
            batch = [texts[key] for key in keys]
            began = time.perf_counter()
            vectors = _checked(self._embedder.encode_documents(batch), self._embedder)
            self.counts.embed_s += time.perf_counter() - began
            self._journal.append(keys, vectors)
            self.counts.embedded += len(keys)
            self.counts.truncated += _count_truncated(self._embedder, batch)
            self._report()

    def _report(self, *, stage: str = "embed", written: int = 0, total: int = 0) -> None:
        if self._progress is None:
            return
        counts = self.counts
        self._progress(
            IngestProgress(
                stage=stage,
                documents=len(counts.seen),
                chunks=counts.chunks,
                embedded=counts.embedded,
                reused=counts.reused + counts.resumed,
                written=written,
                total=total,
            )
        )


def _checked(vectors: NDArray[np.float32], embedder: TextEmbedder) -> NDArray[np.float32]:
    """Refuse vectors that would poison every search: FAISS orders NaN anywhere."""
    if not np.isfinite(vectors).all():
        raise RetrievalError(
            f"embedder {embedder.name} returned values that are not finite; try dtype float32"
        )
    return vectors


def _count_truncated(embedder: TextEmbedder, texts: Sequence[str]) -> int:
    if not isinstance(embedder, Embedder):
        return 0
    limit = embedder.max_tokens
    # A token is at least one character, so short texts need no counting.
    long = [text for text in texts if limit is not None and len(text) >= limit]
    return sum(1 for count in embedder.count_tokens(long) if limit and count > limit) if long else 0
