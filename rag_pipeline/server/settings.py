"""What an operator decides about the RAG routes; SGLang's own flags are not here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rag_pipeline.errors import RagPipelineError
from rag_pipeline.server.parse_worker import ParseLimits

if TYPE_CHECKING:
    from rag_pipeline.memory import MemoryConfig

MIN_PARSE_BYTES = 256 << 20

SEARCHES = ("dense", "bm25", "hybrid")


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerSettings:
    """Settings of the RAG routes.

    Parameters
    ----------
    model : Path
        Folder of the served model.
    embedder : str
        Embedder of new indexes, by name, folder or hub id.
    policy, search, top_k, document_order : str, str, int, str
        Used where a request does not say.
    memory : MemoryConfig or None
        What long conversations are answered from where a request does not say; None for all of them.
    chunk_tokens, overlap : int
        Splitter of new indexes; an existing index keeps its own.
    max_upload_bytes, max_upload_files : int
        Of one upload.
    max_queued_jobs : int
        Uploads and deletions of one tenant that wait or run.
    parse_seconds, parse_bytes : int
        CPU time and address space of the process that reads and splits one file; wall time is twice
        that.
    max_documents, max_chunks : int
        Out of one upload.
    max_index_chunks : int
        In one index; an upload may replace what it holds of the same files.
    job_seconds : int
        For the whole of one upload, from the moment it is its turn.
    open_to_network : bool
        Answer other machines without a key.
    max_body_bytes : int
        Of one request to SGLang's own routes.
    max_searches : int
        Searches that wait or run, those of questions apart; a tenant has half of it.
    max_questions : int
        Requests that search and generate, waiting or answered; a tenant has half of it.
    max_connections : int
        Open at once.
    stop_seconds : int
        That requests have to end after SIGTERM.
    """

    model: Path
    embedder: str
    policy: str = "query"
    memory: MemoryConfig | None = None
    search: str = "dense"
    top_k: int = 4
    document_order: str = "retrieved"
    chunk_tokens: int = 192
    overlap: int = 0
    max_upload_bytes: int = 16 << 20
    max_upload_files: int = 64
    max_queued_jobs: int = 16
    parse_seconds: int = 60
    parse_bytes: int = 1 << 30
    max_documents: int = 50_000
    max_chunks: int = 50_000
    max_index_chunks: int = 1_000_000
    job_seconds: int = 1800
    open_to_network: bool = False
    max_body_bytes: int = 64 << 20
    max_searches: int = 64
    max_questions: int = 128
    max_connections: int = 1024
    stop_seconds: int = 15

    def __post_init__(self) -> None:
        if self.search not in SEARCHES:
            raise RagPipelineError(
                f"--search is {self.search!r}; it must be one of {', '.join(SEARCHES)}"
            )
        if self.overlap >= self.chunk_tokens:
            raise RagPipelineError(
                f"--overlap is {self.overlap}; it must be below --chunk-tokens ({self.chunk_tokens})"
            )
        for name in (
            "max_upload_bytes",
            "max_upload_files",
            "max_queued_jobs",
            "max_documents",
            "max_chunks",
            "max_index_chunks",
            "parse_seconds",
            "job_seconds",
            "max_body_bytes",
            "max_searches",
            "max_questions",
            "max_connections",
        ):
            if getattr(self, name) < 1:
                raise RagPipelineError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.parse_bytes < MIN_PARSE_BYTES:
            raise RagPipelineError(
                f"parse_bytes is {self.parse_bytes}; a parser needs at least {MIN_PARSE_BYTES}"
            )

    @property
    def max_requests(self) -> int:
        """Requests under way at once; fewer than connections, so that health is answered when no more are."""
        return max(1, self.max_connections - self.max_connections // 8)

    @property
    def max_held_bytes(self) -> int:
        """Bytes of bodies under way at once: eight of the largest."""
        return 8 * max(self.max_body_bytes, self.max_upload_bytes)

    def parse_limits(self) -> ParseLimits:
        """Limits of the process that reads one file; what comes out of it goes with what comes in."""
        return ParseLimits(
            seconds=self.parse_seconds,
            memory_bytes=self.parse_bytes,
            unpacked_bytes=8 * self.max_upload_bytes,
            text_chars=4 * self.max_upload_bytes,
            documents=self.max_documents,
            chunks=self.max_chunks,
        )
