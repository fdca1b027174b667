"""One upload: where it stands, what a client sees of it, and what the next server reads of it."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rag_pipeline.server.errors import without_paths

_ENDED = ("done", "failed")
_MAX_NOTES = 100
_SAVED = (
    "id", "order", "created", "ended_at", "tenant", "index", "index_folder", "files", "state",
    "tries", "documents", "chunks", "skipped", "notes", "error",
)  # fmt: skip


@dataclass(kw_only=True, slots=True)
class Job:
    """One upload, from its acceptance to its result."""

    tenant: str
    index: str
    index_folder: str
    files: list[str]
    id: str = field(default_factory=lambda: f"job-{uuid.uuid4().hex[:16]}")
    order: int = 0
    created: float = field(default_factory=time.time)
    ended_at: float | None = None
    state: str = "queued"
    progress: float = 0.0
    tries: int = 0
    documents: int = 0
    chunks: int = 0
    skipped: list[dict[str, str]] = field(default_factory=list)
    notes: list[dict[str, str]] = field(default_factory=list)
    error: str | None = None
    cancelled: bool = False

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen."""
        return self.state in _ENDED

    def skip(self, name: str, reason: str) -> None:
        """Note a file that gave nothing; a job that is done again says it once."""
        item = {"name": name, "reason": without_paths(reason)}
        if item not in self.skipped:
            self.skipped.append(item)

    def remark(self, name: str, notes: Iterable[str]) -> None:
        """Note what of a file was left out or guessed."""
        for note in notes:
            item = {"name": name, "note": note}
            if item not in self.notes and len(self.notes) < _MAX_NOTES:
                self.notes.append(item)

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
            "notes": self.notes,
            "error": self.error,
        }

    def to_record(self) -> dict[str, Any]:
        """What the next server needs to know."""
        return {name: getattr(self, name) for name in _SAVED}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Job:
        """Read what :meth:`to_record` gave."""
        # A record of an older version has fewer fields.
        job = cls(**{name: record[name] for name in _SAVED if name in record})
        job.progress = 1.0 if job.state == "done" else 0.0
        if not job.ended:
            job.state, job.documents, job.chunks = "queued", 0, 0
        return job
