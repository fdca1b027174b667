"""Documents into an index: split, embed what is new, commit; resumable and bounded in memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from retrievers.embedding_reuse import ReusingEmbedder
from retrievers.errors import RetrievalError
from retrievers.index_lock import leftovers, remove_unfinished
from retrievers.index_settings import IndexSettings, document_hash, indexed_text, settings_mark
from retrievers.index_writer import IndexWriter
from retrievers.ingest_report import IngestProgress, IngestReport, IngestTally
from retrievers.journal import JOURNAL_NAME, EmbeddingJournal
from retrievers.manifest import MANIFEST_NAME, Manifest
from retrievers.metadata import storable_document
from retrievers.prepared import PreparedDocument
from retrievers.removal import Erase
from retrievers.text_embedder import TextEmbedder
from retrievers.types import Chunk, Document

logger = logging.getLogger(__name__)

_FEW = 0.1
"""Share of chunks longer than the embedder reads that is no reason to change their size."""

WINDOW_CHUNKS = 2048
"""Chunks sorted by length together; all that is held in memory of the corpus at a time."""


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


def ingest(
    documents: Iterable[Document | PreparedDocument],
    index_dir: str | Path,
    *,
    splitter: Splitter,
    embedder: TextEmbedder,
    factory: str | None = None,
    search_options: str | None = None,
    include_title: bool = True,
    sync: bool = False,
    supersedes: Callable[[str], bool] | None = None,
    erase: Erase | None = None,
    progress: Callable[[IngestProgress], None] | None = None,
) -> IngestReport:
    """Bring an index up to date with documents.

    Unchanged documents are skipped, changed ones replaced, new ones added. A text that the index
    or an interrupted run has embedded is not embedded again. The index stays usable as it was
    until the last step; interrupted (even killed), the next call resumes.

    Parameters
    ----------
    documents : iterable of (Document or PreparedDocument)
        Read once, one at a time.
    index_dir : str or Path
        Index folder, created where missing.
    splitter : Splitter
        Cuts documents into chunks.
    embedder : TextEmbedder
        Model; must be the one of the index where there is one.
    factory : str, optional
        FAISS factory string, or ``"auto"``; ``None`` keeps what the index has (``"auto"`` for a
        new one).
    search_options : str, optional
        FAISS parameter string stored with the index, such as ``"nprobe=32"``.
    include_title : bool
        Embed and match the title together with the text.
    sync : bool
        Also remove documents of the index that are not among `documents`.
    supersedes : callable, optional
        Also remove those of them for whose id this is true; asked when all documents were read.
    erase : Erase, optional
        Called with the chunks that left the index, see :mod:`retrievers.removal`.
    progress : callable, optional
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
    tally = IngestTally(progress=progress)
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
    with IndexWriter(index_dir, settings, erase=erase) as writer:
        before = writer.manifest
        journal = EmbeddingJournal(writer.work / JOURNAL_NAME, embedder.fingerprint, embedder.dim)
        vectors = ReusingEmbedder(embedder, writer.current, journal, tally)
        run = _IngestRun(writer, splitter, vectors, tally)
        run.read(documents)
        if sync:
            run.remove_unseen(lambda _: True)
        else:
            if supersedes is not None:
                run.remove_unseen(supersedes)
            run.refuse_mixed_settings()
        if not writer.document_ids() and before is None:
            raise RetrievalError("there is nothing to ingest: no document was found")
        manifest = writer.commit(partial(tally.tell, "write"))
    if tally.truncated:
        # A few are a table or code of many signs; many are chunks that are too large.
        logger.log(
            logging.WARNING if tally.truncated > _FEW * tally.embedded else logging.INFO,
            "%d of %d chunks are longer than the embedder %s reads; use smaller chunks",
            tally.truncated,
            tally.embedded,
            embedder.name,
        )
    return tally.report(before, manifest)


def delete_documents(
    index_dir: str | Path, document_ids: Sequence[str], *, erase: Erase | None = None
) -> int:
    """Remove documents from an index, without its embedder.

    Parameters
    ----------
    index_dir : str or Path
        Index folder.
    document_ids : sequence of str
        Documents to remove; every one must be in the index.
    erase : Erase, optional
        Called with the chunks that left the index, see :mod:`retrievers.removal`.

    Returns
    -------
    int
        Chunks that went with them.
    """
    manifest = Manifest.read(Path(index_dir))
    with IndexWriter(index_dir, manifest.settings, erase=erase) as writer:
        for document_id in dict.fromkeys(document_ids):
            if not writer.remove_document(document_id):
                raise RetrievalError(f"the index {index_dir} holds no document {document_id!r}")
        return manifest.num_chunks - writer.commit().num_chunks


def finish_removals(index_dir: str | Path, *, erase: Erase | None = None) -> None:
    """Remove what a killed process left: older states of an index, staged text; without such files, nothing.

    The embeddings that an interrupted ingest resumes from stay.

    Parameters
    ----------
    index_dir : str or Path
        Index folder; one in which a first ingest was killed holds no index yet.
    erase : Erase, optional
        Called with the chunks that left the index, see :mod:`retrievers.removal`.

    Raises
    ------
    IndexBusyError
        Where another process changes the index: it does the same.
    """
    folder = Path(index_dir)
    if (folder / MANIFEST_NAME).exists():
        manifest = Manifest.read(folder)
        if leftovers(folder, manifest.generation):
            IndexWriter(folder, manifest.settings, erase=erase).close()
    elif leftovers(folder, None):
        remove_unfinished(folder)


class _IngestRun:
    """One pass over the documents, a window of chunks at a time."""

    def __init__(
        self,
        writer: IndexWriter,
        splitter: Splitter,
        embedder: ReusingEmbedder,
        tally: IngestTally,
    ) -> None:
        self._writer = writer
        self._splitter = splitter
        self._embedder = embedder
        self._tally = tally
        self._window: list[Chunk] = []

    def read(self, documents: Iterable[Document | PreparedDocument]) -> None:
        """Take in every document."""
        tally = self._tally
        for document in map(self._prepared, documents):
            if document.id in tally.seen:
                raise RetrievalError(
                    f"document id {document.id!r} occurs twice; ids must be distinct"
                )
            tally.seen.add(document.id)
            digest = document.content_hash
            known = self._writer.document(document.id)
            if known is not None and known.content_hash == digest:
                tally.unchanged += 1
                tally.tell()
                continue
            if known is None:
                tally.added += 1
            else:
                tally.changed += 1
            self._writer.put_document(document.id, digest)
            for chunk in document.chunks:
                self._window.append(chunk)
                tally.chunks += 1
                if len(self._window) >= WINDOW_CHUNKS:
                    self._flush()
            tally.tell()
        self._flush()

    def _prepared(self, document: Document | PreparedDocument) -> PreparedDocument:
        if isinstance(document, PreparedDocument):
            return document
        document = storable_document(document)
        return PreparedDocument(
            id=document.id,
            content_hash=document_hash(document, self._writer.settings),
            chunks=self._split(document),
        )

    def _split(self, document: Document) -> Iterator[Chunk]:
        # A generator: an unchanged document is never split.
        yield from self._splitter.split(document)

    def remove_unseen(self, chosen: Callable[[str], bool]) -> None:
        """Remove what the index has and this pass did not meet, where it is chosen."""
        for document_id in filter(chosen, self._unseen()):
            self._writer.remove_document(document_id)
            self._tally.removed += 1

    def refuse_mixed_settings(self) -> None:
        """Documents outside this ingest cannot be split anew: their text is not here."""
        mark = settings_mark(self._writer.settings)
        stale = [
            document_id
            for document_id in self._unseen()
            if (record := self._writer.document(document_id)) is not None
            and not record.content_hash.startswith(mark)
        ]
        if stale:
            raise RetrievalError(
                f"{len(stale)} documents of the index (such as {stale[0]!r}) were split with other "
                "settings and are not among these; ingest them together, drop them with sync, or "
                "use a new folder"
            )

    def _unseen(self) -> list[str]:
        return [name for name in self._writer.document_ids() if name not in self._tally.seen]

    def _flush(self) -> None:
        if not self._window:
            return
        window, self._window = self._window, []
        include_title = self._writer.settings.include_title
        texts = [indexed_text(chunk, include_title) for chunk in window]
        self._writer.append(window, self._embedder.encode_documents(texts))
