"""What an operator decides about the RAG routes; SGLang's own flags are not here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rag_pipeline.errors import RagPipelineError

SEARCHES = ("dense", "bm25", "hybrid")


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerSettings:
    """Settings of the RAG routes.

    Parameters
    ----------
    model
        Folder of the served model.
    embedder
        Embedder of new indexes, by name, folder or hub id.
    policy, search, top_k
        Used where a request does not say.
    chunk_tokens, overlap
        Splitter of new indexes; an existing index keeps its own.
    max_upload_bytes, max_upload_files
        Of one upload.
    max_queued_jobs
        Uploads of one tenant that wait or run.
    parse_seconds, parse_bytes
        CPU time and address space of the process that parses one file; wall time is twice that.
    """

    model: Path
    embedder: str
    policy: str = "query"
    search: str = "dense"
    top_k: int = 4
    chunk_tokens: int = 192
    overlap: int = 0
    max_upload_bytes: int = 16 << 20
    max_upload_files: int = 64
    max_queued_jobs: int = 16
    parse_seconds: int = 30
    parse_bytes: int = 1 << 30

    def __post_init__(self) -> None:
        if self.search not in SEARCHES:
            raise RagPipelineError(
                f"--search is {self.search!r}; it must be one of {', '.join(SEARCHES)}"
            )
        if self.overlap >= self.chunk_tokens:
            raise RagPipelineError(
                f"--overlap is {self.overlap}; it must be below --chunk-tokens ({self.chunk_tokens})"
            )
        for name in ("max_upload_bytes", "max_upload_files", "max_queued_jobs", "parse_seconds"):
            if getattr(self, name) < 1:
                raise RagPipelineError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.parse_bytes < 128 << 20:
            raise RagPipelineError(
                f"parse_bytes is {self.parse_bytes}; a parser needs at least {128 << 20}"
            )
