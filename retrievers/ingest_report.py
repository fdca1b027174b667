"""What an ingest tells of itself: progress while it runs, a report when it is done."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from retrievers.manifest import Manifest


@dataclass(frozen=True, kw_only=True, slots=True)
class IngestProgress:
    """Where an ingest stands.

    Parameters
    ----------
    stage : str
        ``"embed"`` while documents are read, split and embedded; ``"write"`` during the commit.
    documents, chunks : int
        Seen so far; chunks only of new and changed documents.
    embedded, reused : int
        Chunks whose vectors were computed, and taken from the index or an interrupted run.
    written, total : int
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
    documents_added, documents_changed, documents_unchanged, documents_removed : int
        Counts of documents.
    chunks_total : int
        Chunks of the index now.
    chunks_embedded : int
        Texts that went through the embedder.
    chunks_reused : int
        Texts of new or changed documents whose vector the index had, or that occurred twice.
    chunks_resumed : int
        Texts whose vector an interrupted run had left.
    chunks_truncated : int
        Embedded texts longer than the embedder reads; what lies behind does not count in dense
        search.
    embed_s, total_s : float
        Seconds in the embedder and in all.
    factory : str
        FAISS factory of the index.
    changed : bool
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
class IngestTally:
    """Running counts of an ingest, named as in :class:`IngestReport`; time counts from the start.

    Parameters
    ----------
    progress : callable or None
        Who is told, or ``None``.
    seen : set of str
        Ids of the documents met so far.
    chunks : int
        Chunks of new and changed documents so far.
    """

    progress: Callable[[IngestProgress], None] | None
    started: float = field(default_factory=time.perf_counter)
    seen: set[str] = field(default_factory=set)
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

    def tell(self, stage: str = "embed", written: int = 0, total: int = 0) -> None:
        """Pass the state on to `progress`."""
        if self.progress is None:
            return
        self.progress(
            IngestProgress(
                stage=stage,
                documents=len(self.seen),
                chunks=self.chunks,
                embedded=self.embedded,
                reused=self.reused + self.resumed,
                written=written,
                total=total,
            )
        )

    def report(self, before: Manifest | None, after: Manifest) -> IngestReport:
        """Sum up, from the index as it was (``None`` where there was none) and as it is now."""
        return IngestReport(
            documents_added=self.added,
            documents_changed=self.changed,
            documents_unchanged=self.unchanged,
            documents_removed=self.removed,
            chunks_total=after.num_chunks,
            chunks_embedded=self.embedded,
            chunks_reused=self.reused,
            chunks_resumed=self.resumed,
            chunks_truncated=self.truncated,
            embed_s=self.embed_s,
            total_s=time.perf_counter() - self.started,
            factory=after.factory,
            changed=before is None or after.generation != before.generation,
        )
