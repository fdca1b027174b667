"""A spool, indexes, and servers that come and go: uploads without an engine."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from rag_pipeline.server import ServerSettings
from rag_pipeline.server.embedders import EmbedderPool
from rag_pipeline.server.indexes import ServedIndex
from rag_pipeline.server.ingest_job import Job
from rag_pipeline.server.ingest_jobs import IngestJobs

Text = str | bytes


class Uploads:
    """A spool, some indexes, and servers that come and go."""

    def __init__(self, folder: Path, settings: ServerSettings, embedders: EmbedderPool) -> None:
        self.folder = folder
        self.settings = settings
        self.indexes = {
            (tenant, "main"): ServedIndex("main", folder / tenant, embedders)
            for tenant in ("acme", "globex")
        }
        self.jobs = self.start()

    def start(self) -> IngestJobs:
        self.jobs = IngestJobs(self.settings, spool=self.folder / "spool")
        self.jobs.resume(self.indexes)
        return self.jobs

    def index(self, tenant: str = "acme") -> ServedIndex:
        return self.indexes[tenant, "main"]

    def submit(self, files: dict[str, Text], tenant: str = "acme") -> Job:
        folder = self.jobs.new_folder()
        for name, content in files.items():
            data = content.encode() if isinstance(content, str) else content
            self.jobs.add_file(folder, name, [data])
        return self.jobs.submit(tenant, self.index(tenant), folder)

    def upload(self, files: dict[str, Text], tenant: str = "acme") -> Job:
        job = self.submit(files, tenant)
        self.wait(lambda: job.ended)
        return job

    def delete(self, document_id: str, tenant: str = "acme") -> int:
        return self.jobs.delete(tenant, self.index(tenant), document_id).result(60)

    def ids(self, tenant: str = "acme") -> set[str]:
        current = self.index(tenant).current()
        return set() if current is None else {record.id for record in current.documents()}

    def left(self) -> list[Path]:
        """Files of uploads in the spool, records and locks aside."""
        spool = self.folder / "spool"
        names = ("job.json", ".lock")
        return [path for path in spool.rglob("*") if path.is_file() and path.name not in names]

    @staticmethod
    def wait(ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while not ready():
            assert time.monotonic() < deadline
            time.sleep(0.02)


def records(*pairs: tuple[str, str]) -> str:
    return "".join(json.dumps({"id": key, "text": text}) + "\n" for key, text in pairs)
