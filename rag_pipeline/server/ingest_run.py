"""One upload into its index: every file read and split in a process with limits, then one commit."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from rag_pipeline.server.file_names import file_of
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
    settings
        Limits, and the splitter of new indexes.
    work
        Folder for what parsers write.
    erase
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
        chunks, held = 0, _chunks_by_file(index, files)
        for number, (name, file) in enumerate(files.items()):
            check()
            # What this upload has replaced, or will by this file, makes room for it.
            others = sum(n for file, n in held.items() if file not in read and file != name)
            room = self._settings.max_index_chunks - others - chunks
            left = replace(
                limits,
                documents=limits.documents - job.documents,
                chunks=max(0, min(limits.chunks - chunks, room)),
            )
            try:
                with self._parsers.turn(check):
                    parsed = parse_upload(file, work=work, limits=left, split=split, check=check)
                read.add(name)
                job.remark(name, parsed.notes)
                for document in parsed.documents:
                    job.documents += 1
                    chunks += document.num_chunks
                    yield document
            except ParseError as error:
                reason = str(error)
                if left.chunks < limits.chunks - chunks and f"{left.chunks} chunks" in reason:
                    reason += (
                        f" (the index has room for {left.chunks} more chunks: delete documents, or raise "
                        "--max-index-chunks)"
                    )
                job.skip(name, reason)
            finally:
                shutil.rmtree(work, ignore_errors=True)
            job.progress = max(job.progress, _PARSED * (number + 1) / len(files))

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


def _chunks_by_file(index: ServedIndex, files: Mapping[str, Path]) -> Counter[str]:
    """Chunks that an index holds of these uploaded files, and all others under the empty name."""
    held: Counter[str] = Counter()
    current = index.current()
    for record in () if current is None else current.documents():
        file = file_of(record.id) or ""
        held[file if file in files else ""] += record.num_chunks
    return held


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
