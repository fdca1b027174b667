"""One upload into its index: every file read and split in a process with limits, then one commit."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from rag_pipeline.server.file_names import file_of
from rag_pipeline.server.index_quota import IndexQuota
from rag_pipeline.server.indexes import ServedIndex
from rag_pipeline.server.ingest_job import Job
from rag_pipeline.server.parsing import ParseError, SplitTask, parse_upload
from rag_pipeline.server.settings import ServerSettings
from rag_pipeline.server.turns import Turns
from retrievers import (
    Erase,
    HFTokenizer,
    IngestProgress,
    PreparedDocument,
    RetrievalError,
    TokenSplitter,
    chunk_count,
    document_records,
    ingest,
)

# Shares of the bar: parsing a file is quick beside embedding its chunks, and writing is quick again.
_PARSED, _EMBEDDED = 0.1, 0.9


class Stopped(RetrievalError):
    """The server is stopping; the upload stays for the next one."""


class TookTooLong(RetrievalError):
    """The upload had its share of the machine."""


class Cancelled(RetrievalError):
    """Its owner does not want the upload any more."""


class IngestRun:
    """Does the work of uploads, for several tenants at once.

    Parameters
    ----------
    settings : ServerSettings
        Limits, and the splitter of new indexes.
    work : Path
        Folder for what parsers write.
    erase : Erase, optional
        Called with the chunks that left an index, see :mod:`retrievers.removal`.
    """

    def __init__(self, settings: ServerSettings, work: Path, erase: Erase | None = None) -> None:
        self._settings = settings
        self._work = work
        self._erase = erase
        self._parsers = Turns(max(2, (os.cpu_count() or 2) // 2))
        self._loading = threading.Lock()
        self._loaded: tuple[HFTokenizer, Path] | None = None

    def __call__(
        self, job: Job, index: ServedIndex, files: Mapping[str, Path], check: Callable[[], None]
    ) -> None:
        """Bring the files of a job into an index; the job shows how far it is.

        Files replace what the index had of the same names. One that cannot be read is listed and
        does not stop the others; what the index had of it stays.

        Raises
        ------
        ParseError, RetrievalError
            Where nothing came of it; the index is as it was.
        """
        end = time.monotonic() + self._settings.job_seconds

        def step() -> None:
            check()
            if time.monotonic() > end:
                raise TookTooLong(
                    f"the upload took longer than {self._settings.job_seconds} s; what was embedded "
                    "is kept: send it again, in parts, or raise --job-seconds"
                )

        def show(progress: IngestProgress) -> None:
            step()
            _show(job, progress)

        splitter = self._splitter(index)
        read: set[str] = set()
        ingest(
            self._documents(job, index, files, splitter, read, step),
            index.folder,
            splitter=splitter,
            embedder=index.embedder(),
            supersedes=lambda document_id: file_of(document_id) in read,
            erase=self._erase,
            progress=show,
        )
        if not job.documents:
            raise ParseError("no file gave a document")

    def _documents(
        self,
        job: Job,
        index: ServedIndex,
        files: Mapping[str, Path],
        splitter: TokenSplitter,
        read: set[str],
        check: Callable[[], None],
    ) -> Iterator[PreparedDocument]:
        split = SplitTask(
            tokenizer=str(self._tokenizer[1]),
            chunk_tokens=splitter.chunk_tokens,
            overlap=splitter.overlap,
            settings=dict(splitter.settings),
            tokenizer_fingerprint=splitter.tokenizer.fingerprint,
        )
        limits = self._settings.parse_limits()
        work = self._work / f"{job.id}.work"
        most = self._settings.max_index_chunks
        # Where an upload of the largest size has room, nobody needs to know what the index has of its files.
        may_fill = chunk_count(index.folder) + limits.chunks > most
        quota = IndexQuota(most, document_records(index.folder) if may_fill else (), files)
        chunks = 0
        crowded: dict[str, int] = {}

        def prepared(name: str, room: int) -> Iterator[PreparedDocument]:
            nonlocal chunks
            left = replace(
                limits,
                documents=limits.documents - job.documents,
                chunks=max(0, min(limits.chunks - chunks, room)),
            )
            try:
                with self._parsers.turn(check):
                    parsed = parse_upload(
                        files[name], work=work, limits=left, split=split, check=check
                    )
                read.add(name)
                quota.replace(name)
                job.remark(name, parsed.notes)
                for document in parsed.documents:
                    job.documents += 1
                    chunks += document.num_chunks
                    quota.add(document.num_chunks)
                    yield document
            finally:
                shutil.rmtree(work, ignore_errors=True)

        waiting = deque(files)
        while waiting:
            check()
            name = waiting.popleft()
            room = quota.room_for(name)
            try:
                if room <= crowded.get(name, -1):
                    raise ParseError(_no_room(room))
                yield from prepared(name, room)
            except ParseError as error:
                has_no_room = room < limits.chunks - chunks and f"more than {room} chunks" in str(
                    error
                )
                if has_no_room and name not in crowded:
                    # Those behind it may become smaller than they were.
                    crowded[name] = room
                    waiting.append(name)
                else:
                    job.skip(name, _no_room(room) if has_no_room else str(error))
            job.progress = max(job.progress, _PARSED * (1 - len(waiting) / len(files)))

    def _splitter(self, index: ServedIndex) -> TokenSplitter:
        """The index's own settings where there are some: an index is split in one way."""
        manifest = index.manifest()
        known = {} if manifest is None else dict(manifest.splitter)
        return TokenSplitter(
            self._tokenizer[0],
            chunk_tokens=int(known.get("chunk_tokens", self._settings.chunk_tokens)),
            overlap=int(known.get("overlap", self._settings.overlap)),
        )

    @property
    def _tokenizer(self) -> tuple[HFTokenizer, Path]:
        """The served model's tokenizer, and a file that a worker reads it from."""
        with self._loading:
            if self._loaded is None:
                tokenizer = HFTokenizer(self._settings.model)
                file = self._settings.model / "tokenizer.json"
                if not file.is_file():
                    # Converted once: that takes more memory than a worker has.
                    file = self._work / "tokenizer.json"
                    tokenizer.save(file)
                self._loaded = tokenizer, file.resolve()
            return self._loaded


def _no_room(chunks: int) -> str:
    return (
        f"it gives more than {chunks} chunks, and the index has room for no more of this file; delete "
        "documents, or raise --max-index-chunks"
    )


def _show(job: Job, progress: IngestProgress) -> None:
    job.chunks = progress.chunks
    if progress.stage == "write":
        job.state = "writing"
        share = progress.written / max(1, progress.total)
        job.progress = max(job.progress, _EMBEDDED + (1 - _EMBEDDED) * share)
    elif progress.chunks:
        job.state = "embedding"
        share = (progress.embedded + progress.reused) / progress.chunks
        job.progress = max(job.progress, _PARSED + (_EMBEDDED - _PARSED) * share)
