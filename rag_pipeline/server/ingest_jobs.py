"""Uploads on their way into an index: one at a time, in the background, each with its progress."""

from __future__ import annotations

import logging
import shutil
import tempfile
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rag_pipeline.server.errors import ApiError
from rag_pipeline.server.indexes import ServedIndex
from rag_pipeline.server.parsing import ParseError, parse_upload
from rag_pipeline.server.settings import ServerSettings
from retrievers import (
    Document,
    HFTokenizer,
    IngestProgress,
    RetrievalError,
    TokenSplitter,
    delete_documents,
    ingest,
)

logger = logging.getLogger(__name__)

_ENDED = ("done", "failed")
_KEPT_JOBS = 200
# Shares of the bar: parsing a file is quick beside embedding its chunks, and writing is quick again.
_PARSED, _EMBEDDED = 0.1, 0.9


@dataclass(kw_only=True, slots=True)
class Job:
    """One upload."""

    tenant: str
    index: str
    files: list[str]
    id: str = field(default_factory=lambda: f"job-{uuid.uuid4().hex[:16]}")
    created: float = field(default_factory=time.time)
    state: str = "queued"
    progress: float = 0.0
    documents: int = 0
    chunks: int = 0
    skipped: list[dict[str, str]] = field(default_factory=list)
    error: str | None = None

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen."""
        return self.state in _ENDED

    def to_json(self) -> dict[str, Any]:
        """What a client sees."""
        return {
            "id": self.id,
            "object": "rag.ingest_job",
            "created": int(self.created),
            "index": self.index,
            "files": self.files,
            "state": self.state,
            "progress": round(self.progress, 4),
            "documents": self.documents,
            "chunks": self.chunks,
            "skipped": self.skipped,
            "error": self.error,
        }


class IngestJobs:
    """The one thread that changes indexes.

    Parameters
    ----------
    settings
        Limits, and the splitter of new indexes.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rag-ingest")
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._tokenizer: HFTokenizer | None = None
        self._work = tempfile.TemporaryDirectory(prefix="rag-uploads-")

    def new_folder(self) -> Path:
        """Empty folder for the files of one upload; :meth:`submit` takes it over."""
        return Path(tempfile.mkdtemp(dir=self._work.name))

    def check_room(self, tenant: str) -> None:
        """Refuse an upload before its files are read.

        Raises
        ------
        ApiError
            429 when the tenant has too many uploads under way.
        """
        with self._lock:
            self._refuse_crowd(tenant)

    def _refuse_crowd(self, tenant: str) -> None:
        waiting = sum(job.tenant == tenant and not job.ended for job in self._jobs.values())
        if waiting >= self._settings.max_queued_jobs:
            raise ApiError(
                429,
                f"{waiting} uploads are still under way; wait until some are done and try again",
            )

    def submit(self, tenant: str, index: ServedIndex, folder: Path) -> Job:
        """Queue the files of a folder; the folder is removed in the end."""
        job = Job(
            tenant=tenant, index=index.name, files=sorted(file.name for file in folder.iterdir())
        )
        with self._lock:
            self._refuse_crowd(tenant)  # several may have passed the first check together
            self._jobs[job.id] = job
            ended = [known.id for known in self._jobs.values() if known.ended]
            for old in ended[: max(0, len(self._jobs) - _KEPT_JOBS)]:
                del self._jobs[old]
        self._thread.submit(self._run, job, index, folder)
        return job

    def delete(self, index: ServedIndex, document_id: str) -> Future[int]:
        """Remove a document when the uploads before are done; gives the chunks that went."""
        return self._thread.submit(delete_documents, index.folder, [document_id])

    def get(self, tenant: str, job_id: str) -> Job:
        """Job of a tenant by id, or 404: another tenant's job is as unknown as none."""
        with self._lock:
            job = self._jobs.get(job_id)
        if job is None or job.tenant != tenant:
            raise ApiError(404, f"no upload {job_id[:80]!r}; it ended long ago or never was")
        return job

    def of(self, tenant: str, index: str) -> list[Job]:
        """Jobs of a tenant on an index, newest first."""
        with self._lock:
            return [
                job
                for job in reversed(self._jobs.values())
                if job.tenant == tenant and job.index == index
            ]

    def close(self) -> None:
        """Stop at the next step; an index that was being changed stays as it was, and resumes."""
        self._stop.set()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _check_stop(self) -> None:
        if self._stop.is_set():
            raise RetrievalError("the server is stopping; upload again, what is done is kept")

    def _run(self, job: Job, index: ServedIndex, folder: Path) -> None:
        try:
            report = ingest(
                self._documents(job, folder),
                index.folder,
                splitter=self._splitter(index),
                embedder=index.embedder(),
                progress=lambda progress: self._show(job, progress),
            )
            if not job.documents:
                raise ParseError("no file gave a document")
            logger.info("Upload %s: %s", job.id, report)
            job.state, job.progress = "done", 1.0
        except (RetrievalError, ParseError) as error:
            reasons = [f"{item['name']}: {item['reason']}" for item in job.skipped]
            self._fail(job, reasons[0] if reasons and not job.documents else str(error))
        except Exception as error:
            logger.exception("Upload %s failed", job.id)
            self._fail(job, f"a fault of this server ({type(error).__name__}); see its log")
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _fail(self, job: Job, reason: str) -> None:
        job.error = " ".join(reason.split())[:500]
        job.state = "failed"

    def _documents(self, job: Job, folder: Path) -> Iterator[Document]:
        """Parse file after file; one that cannot be read is listed and does not stop the others."""
        job.state = "parsing"
        for number, name in enumerate(job.files):
            self._check_stop()
            try:
                for document in parse_upload(
                    folder / name,
                    seconds=self._settings.parse_seconds,
                    num_bytes=self._settings.parse_bytes,
                ):
                    job.documents += 1
                    yield document
            except ParseError as error:
                job.skipped.append({"name": name, "reason": str(error)})
            job.progress = max(job.progress, _PARSED * (number + 1) / len(job.files))

    def _show(self, job: Job, progress: IngestProgress) -> None:
        self._check_stop()
        job.chunks = progress.chunks
        if progress.stage == "write":
            job.state = "writing"
            share = progress.written / max(1, progress.total)
            job.progress = max(job.progress, _EMBEDDED + (1 - _EMBEDDED) * share)
        elif progress.chunks:
            job.state = "embedding"
            share = (progress.embedded + progress.reused) / progress.chunks
            job.progress = max(job.progress, _PARSED + (_EMBEDDED - _PARSED) * share)

    def _splitter(self, index: ServedIndex) -> TokenSplitter:
        """The index's own settings where there are some: an index is split in one way."""
        if self._tokenizer is None:
            self._tokenizer = HFTokenizer(self._settings.model)
        manifest = index.manifest()
        known = {} if manifest is None else dict(manifest.splitter)
        return TokenSplitter(
            self._tokenizer,
            chunk_tokens=int(known.get("chunk_tokens", self._settings.chunk_tokens)),
            overlap=int(known.get("overlap", self._settings.overlap)),
        )


def stage(folder: Path, name: str, content: Sequence[bytes] | bytes) -> None:
    """Write one uploaded file into an upload's folder; `name` went through ``safe_name``."""
    target = folder / name
    if target.exists():
        raise ApiError(400, f"two files are called {name!r}; send one of them", param="name")
    with target.open("xb") as file:
        for piece in [content] if isinstance(content, bytes) else content:
            file.write(piece)
