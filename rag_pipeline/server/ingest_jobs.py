"""Uploads on their way into an index: durable, one queue per tenant, each upload with its progress."""

from __future__ import annotations

import logging
import threading
import time
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from rag_pipeline.config import uploads_dir
from rag_pipeline.server.errors import ApiError, line_of, without_paths
from rag_pipeline.server.file_names import UPLOADS, file_of
from rag_pipeline.server.indexes import ServedIndex
from rag_pipeline.server.ingest_job import Job
from rag_pipeline.server.ingest_run import Cancelled, IngestRun, Stopped
from rag_pipeline.server.parsing import ParseError
from rag_pipeline.server.settings import ServerSettings
from rag_pipeline.server.spool import Spool
from rag_pipeline.server.tenant_queues import TenantQueues
from retrievers import Erase, delete_documents

logger = logging.getLogger(__name__)

KEPT_SECONDS = 24 * 3600
"""How long the result of an upload can be asked for."""

MAX_TRIES = 3
"""An upload at which the server died as often is given up: it may be what kills it."""

_KEPT_JOBS = 200
_CLOSE_S = 10


class IngestJobs:
    """All uploads of a server, and the threads that change its indexes.

    Each tenant has a queue with a thread of its own while there is work, so that nobody waits for
    another's upload; what they share (processes that parse, the embedder) goes round in turns.

    Parameters
    ----------
    settings : ServerSettings
        Limits, and the splitter of new indexes.
    spool : Path, optional
        Folder for uploads under way; the project's own by default.
    erase : Erase, optional
        Erases elsewhere what was made of chunks that left an index, see :mod:`retrievers.removal`.
    """

    def __init__(
        self, settings: ServerSettings, *, spool: Path | None = None, erase: Erase | None = None
    ) -> None:
        self._settings = settings
        self._spool = Spool(spool or uploads_dir())
        self._erase = erase
        self._run = IngestRun(settings, self._spool.folder, erase)
        self._lock = threading.Lock()
        self._queues = TenantQueues()
        self._jobs: dict[str, Job] = {}
        self._folders: dict[str, Path] = {}
        self._deletions: Counter[str] = Counter()
        self._last_order = 0

    # -- what routes call -----------------------------------------------------------------------

    def check_room(self, tenant: str) -> None:
        """Refuse an upload before its files are read.

        Raises
        ------
        ApiError
            429 when the tenant has too much under way.
        """
        with self._lock:
            self._refuse_crowd(tenant)

    def new_folder(self) -> Path:
        """Empty folder for the files of one upload, to be given to :meth:`submit` or :meth:`drop`."""
        return self._spool.new_folder()

    def add_file(self, folder: Path, name: str, pieces: Iterable[bytes]) -> None:
        """Write one file of an upload; `name` went through ``safe_name``."""
        if name in self._spool.files(folder):
            raise ApiError(400, f"two files are called {name!r}; send one of them", param="name")
        self._spool.add_file(folder, name, pieces)

    def drop(self, folder: Path) -> None:
        """Forget an upload that was not submitted."""
        self._spool.remove(folder)

    def submit(
        self,
        tenant: str,
        index: ServedIndex,
        folder: Path,
        *,
        refused: Iterable[dict[str, str]] = (),
    ) -> Job:
        """Queue the files of a folder. Once this returns, the upload is finished or reported as failed."""
        job = Job(
            tenant=tenant,
            index=index.name,
            index_folder=str(index.folder.resolve()),
            files=list(self._spool.files(folder)),
            skipped=list(refused),
        )
        with self._lock:
            self._refuse_crowd(tenant)  # several may have passed the first check together
            job.order = self._last_order = max(self._last_order + 1, time.time_ns())
            self._jobs[job.id], self._folders[job.id] = job, folder
        try:
            self._spool.write(folder, job.to_record())
        except BaseException:
            self._forget(job)
            raise
        self._forget_old(tenant)
        self._queues.put(tenant, lambda: self._work(job, index, folder))
        return job

    def delete(self, tenant: str, index: ServedIndex, document_id: str) -> Future[int]:
        """Remove a document, or all that came from an uploaded file, behind the uploads before it.

        Returns
        -------
        Future of int
            The chunks that went; :class:`ApiError` 404 where there is nothing of this name.

        Raises
        ------
        ApiError
            429 when the tenant has too much under way.
        """
        future: Future[int] = Future()
        with self._lock:
            self._refuse_crowd(tenant)
            self._deletions[tenant] += 1

        def work() -> None:
            # Not when the future ends: one whose client went stands in the queue all the same.
            with self._lock:
                self._deletions[tenant] -= 1
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(self._delete(index, document_id))
            except BaseException as error:
                future.set_exception(error)

        self._queues.put(tenant, work)
        return future

    def cancel(self, tenant: str, job_id: str) -> Job:
        """End an upload at its next step; one that has ended stays as it is."""
        job = self.get(tenant, job_id)
        with self._lock:
            waiting = job.state == "queued" and not job.cancelled
            job.cancelled = True
        if waiting:
            self._end(job, "failed", "cancelled")
        return job

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
            mine = [j for j in self._jobs.values() if j.tenant == tenant and j.index == index]
        return sorted(mine, key=lambda job: -job.order)

    def resume(self, indexes: Mapping[tuple[str, str], ServedIndex]) -> int:
        """Go on with what a server before this one had accepted and not finished.

        Parameters
        ----------
        indexes : mapping of (str, str) to ServedIndex
            By names of tenant and index; uploads to others wait for a server that has them.

        Returns
        -------
        int
            Uploads that are queued again.
        """

        def mine(record: Mapping[str, Any]) -> bool:
            index = indexes.get((str(record.get("tenant")), str(record.get("index"))))
            return index is not None and str(index.folder.resolve()) == record.get("index_folder")

        resumed = 0
        for folder, record in self._spool.take_over(mine):
            job = Job.from_record(record)
            with self._lock:
                self._jobs[job.id], self._folders[job.id] = job, folder
                self._last_order = max(self._last_order, job.order)
            if job.ended:
                self._spool.remove_files(folder)
                continue
            resumed += 1
            index = indexes[job.tenant, job.index]
            self._queues.put(job.tenant, lambda j=job, i=index, f=folder: self._work(j, i, f))  # type: ignore[misc]
        for tenant in {tenant for tenant, _ in indexes}:
            self._forget_old(tenant)
        return resumed

    def close(self) -> None:
        """Stop at the next step. What is not done stays in the spool for the next start."""
        if self._queues.stop(_CLOSE_S):
            self._spool.close()  # else the end of this process does it

    # -- the threads ----------------------------------------------------------------------------

    def _work(self, job: Job, index: ServedIndex, folder: Path) -> None:
        with self._lock:
            if job.cancelled:
                return
            job.tries += 1
            job.state = "parsing"
        try:
            if job.tries > MAX_TRIES:
                raise ParseError(
                    f"the server ended {MAX_TRIES} times while it worked on this upload"
                )
            self._spool.write(folder, job.to_record())
            self._run(job, index, self._spool.files(folder), lambda: self._check(job))
            self._end(job, "done")
        except Stopped:
            job.tries -= 1  # the next server goes on; stopping is not the upload's fault
            self._spool.write(folder, job.to_record())
        except Cancelled:
            self._end(job, "failed", "cancelled")
        except ParseError as error:
            reasons = [f"{item['name']}: {item['reason']}" for item in job.skipped]
            line = reasons[0] if reasons and not job.documents else without_paths(str(error))
            self._end(job, "failed", line)
        except Exception as error:
            logger.exception("Upload %s failed", job.id)
            self._end(job, "failed", line_of(error))

    def _check(self, job: Job) -> None:
        if self._queues.stopped:
            raise Stopped("the server is stopping")
        if job.cancelled:
            raise Cancelled("cancelled")

    def _end(self, job: Job, state: str, error: str | None = None) -> None:
        """Show the result when it is on the disk; a kill before repeats the work, which changes nothing."""
        line = None if error is None else " ".join(error.split())[:500]
        ended_at = time.time()
        folder = self._folders[job.id]
        record = job.to_record() | {"state": state, "error": line, "ended_at": ended_at}
        try:
            self._spool.write(folder, record)
            self._spool.remove_files(folder)
        except OSError:
            logger.exception("The result of upload %s could not be written", job.id)
        with self._lock:
            job.error, job.ended_at, job.state = line, ended_at, state
            job.progress = 1.0 if state == "done" else job.progress
        logger.info("Upload %s is %s%s", job.id, state, f": {line}" if line else "")

    def _delete(self, index: ServedIndex, document_id: str) -> int:
        current = index.current()
        known = [] if current is None else [record.id for record in current.documents()]
        for wanted in dict.fromkeys((document_id, unicodedata.normalize("NFC", document_id))):
            name = wanted.removeprefix(f"{UPLOADS}/")
            by_name = wanted != name
            found = [
                known_id
                for known_id in known
                if known_id == wanted or (by_name and file_of(known_id) == name)
            ]
            if found:
                return delete_documents(index.folder, found, erase=self._erase)
        raise ApiError(404, f"the index {index.name!r} holds no document {document_id[:200]!r}")

    # -- housekeeping ---------------------------------------------------------------------------

    def _refuse_crowd(self, tenant: str) -> None:
        waiting = sum(job.tenant == tenant and not job.ended for job in self._jobs.values())
        waiting += self._deletions[tenant]
        if waiting >= self._settings.max_queued_jobs:
            raise ApiError(
                429,
                f"{waiting} uploads and deletions are still under way; wait until some are done and try "
                "again",
            )

    def _forget_old(self, tenant: str) -> None:
        with self._lock:
            ended = [j for j in self._jobs.values() if j.tenant == tenant and j.ended]
        ended.sort(key=lambda job: job.order, reverse=True)
        now = time.time()
        for number, job in enumerate(ended):
            if number >= _KEPT_JOBS or now - (job.ended_at or now) > KEPT_SECONDS:
                self._forget(job)

    def _forget(self, job: Job) -> None:
        with self._lock:
            self._jobs.pop(job.id, None)
            folder = self._folders.pop(job.id, None)
        if folder is not None:
            self._spool.remove(folder)
