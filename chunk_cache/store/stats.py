"""Counters of a store, as plain integers that are ready for JSON and for a metrics exporter."""

from __future__ import annotations

import dataclasses

from chunk_cache.errors import IntegrityError


@dataclasses.dataclass(kw_only=True, slots=True)
class StoreStats:
    """Counts since the store was made; the four ``*_now`` fields are gauges.

    Every look-up is exactly one hit or one miss, so ``hits + misses`` is the number of look-ups.
    """

    hits: int = 0
    hits_whole: int = 0
    """Hits on a whole chunk (the caller says which run it uses)."""
    hits_partial: int = 0
    """Hits of which only a run of the chunk is used."""
    misses: int = 0
    misses_absent: int = 0
    misses_building: int = 0
    misses_failed: int = 0
    misses_tokens_differ: int = 0
    """A key was there but its token ids were others: never served."""
    tokens_hit: int = 0

    inserted: int = 0
    upgraded: int = 0
    """Records that came back from a tier approximate, and gave way to the exact one."""
    evicted: int = 0
    evicted_bytes: int = 0
    evicted_by_hand: int = 0
    pins_expired: int = 0
    rejected_too_big: int = 0
    """Records larger than the whole budget."""
    rejected_no_room: int = 0
    """Records for which not enough could be evicted: the rest is pinned or in use."""
    builds_begun: int = 0
    builds_refused: int = 0
    """A second writer was told BUILDING, READY or FAILED."""
    builds_aborted: int = 0
    builds_expired: int = 0
    corrupt: int = 0
    """Records or files that failed their checksum; dropped, counted as absent afterwards."""

    prompts_matched: int = 0
    tokens_scanned: int = 0
    tokens_matched: int = 0
    matches_truncated: int = 0
    """Prompts for which the matcher's limits cut candidates (see ``ChunkMatcher``)."""

    chunks_now: int = 0
    bytes_now: int = 0
    pinned_bytes_now: int = 0
    in_use_now: int = 0
    byte_budget: int = 0

    def to_json(self) -> dict[str, int]:
        """Return all fields as a dict."""
        return dataclasses.asdict(self)

    def check(self) -> None:
        """Check that hits and misses add up; see :meth:`MemoryStore.check_integrity`."""
        if self.hits != self.hits_whole + self.hits_partial:
            raise IntegrityError("store: hits do not add up")
        kinds = (
            self.misses_absent,
            self.misses_building,
            self.misses_failed,
            self.misses_tokens_differ,
        )
        if self.misses != sum(kinds):
            raise IntegrityError("store: misses do not add up")
