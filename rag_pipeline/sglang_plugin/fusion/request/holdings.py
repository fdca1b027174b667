"""What a request holds of the chunk store: leases on stored runs, and rights to build."""

from __future__ import annotations

import dataclasses

from chunk_cache import Build, Lease, Match


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Capture:
    """A chunk whose KV this request computes exactly: prompt positions ``[start, end)``."""

    start: int
    end: int
    base_position: int
    build: Build


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LeasedSpan:
    """A run of a stored chunk at prompt positions ``[start, end)``, with the lease that holds it.

    ``is_turn`` marks a run that an earlier turn of the conversation left: no policy recomputes it.
    ``is_behind_passage`` marks KV that saw the neutral passage.
    ``is_exact`` marks KV that plain prefill of the prompt would compute too, behind exact KV.
    """

    match: Match
    lease: Lease
    is_turn: bool = False
    is_behind_passage: bool = False
    is_exact: bool = False

    @property
    def start(self) -> int:
        """First prompt position."""
        return self.match.prompt_start

    @property
    def end(self) -> int:
        """One past the last prompt position."""
        return self.match.prompt_end

    @property
    def delta(self) -> int:
        """New position minus the position that the KV was computed at."""
        return self.start - (self.lease.record.base_position + self.match.chunk_offset)
