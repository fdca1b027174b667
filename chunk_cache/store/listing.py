"""What a store shows of itself: one line per entry, and how a prompt's spans came out."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from chunk_cache.keys import ChunkKey
from chunk_cache.spans import Match
from chunk_cache.store.builds import BuildTable, ChunkState
from chunk_cache.store.ledger import Ledger


class Resolution(NamedTuple):
    """What a prompt's spans came to."""

    matches: list[Match]
    """Disjoint runs that were in the store a moment ago, in prompt order; lease them to use them."""
    missing: list[tuple[int, int]]
    """Explicit spans whose chunk is not READY: worth building in the background."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EntryInfo:
    """One line of a listing."""

    key: ChunkKey
    state: ChunkState
    num_bytes: int = 0
    base_position: int = 0
    pinned: bool = False
    pin_ttl_s: float | None = None
    """Seconds that its pin still holds; None for one without an end."""
    in_use: int = 0
    hits: int = 0
    codec: str = ""
    """What a READY record's KV went through; a lossy one makes it approximate."""
    idle_s: float = 0.0
    """Seconds since the last use."""
    detail: str = ""
    """Owner of a build, or why it failed."""

    def to_json(self) -> dict[str, Any]:
        """Return the fields as a JSON-ready dict."""
        return {
            "key": self.key.digest,
            "namespace": self.key.namespace,
            "num_tokens": self.key.num_tokens,
            "state": self.state.value,
            "num_bytes": self.num_bytes,
            "base_position": self.base_position,
            "pinned": self.pinned,
            "pin_ttl_s": None if self.pin_ttl_s is None else round(self.pin_ttl_s, 3),
            "in_use": self.in_use,
            "hits": self.hits,
            "codec": self.codec,
            "idle_s": round(self.idle_s, 3),
            "detail": self.detail,
        }


def list_entries(ledger: Ledger, builds: BuildTable, now: float) -> list[EntryInfo]:
    """List READY keys, most recently used first, then BUILDING, LOADING and FAILED ones."""
    ready = [
        EntryInfo(
            key=key,
            state=ChunkState.READY,
            num_bytes=entry.record.num_bytes,
            base_position=entry.record.base_position,
            pinned=entry.pinned,
            pin_ttl_s=None if key not in ledger.pin_ends else ledger.pin_ends[key] - now,
            in_use=entry.refs,
            hits=entry.hits,
            codec=entry.record.codec,
            idle_s=now - entry.used_at,
        )
        for key, entry in ledger.entries.items()
    ]
    ready.sort(key=lambda info: (info.idle_s, info.key.digest))
    building = [
        EntryInfo(
            key=key,
            state=builds.state(key) or ChunkState.BUILDING,
            num_bytes=0 if build.loading is None else build.loading.record.num_bytes,
            in_use=0 if build.loading is None else build.loading.refs - 1,
            detail=build.owner,
        )
        for key, build in builds.building.items()
    ]
    failed = [
        EntryInfo(key=key, state=ChunkState.FAILED, detail=reason)
        for key, (_, reason) in builds.failed.items()
    ]
    return ready + building + failed
