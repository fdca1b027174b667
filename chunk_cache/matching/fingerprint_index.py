"""Fingerprints of all chunks in sorted arrays, written in growing runs (a small LSM tree).

16 bytes a fingerprint (hash, and chunk number with offset), no per-chunk Python containers. New
fingerprints wait in a short list, become a sorted run at the next look-up at the latest, and runs are merged when
the newer is at least a quarter of the older: a look-up searches a handful of arrays, and a
fingerprint is moved a logarithmic number of times.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from chunk_cache.matching.hashing import Hashes, Positions

OFFSET_BITS = 24
"""A posting is ``chunk number << 24 | offset``: chunks up to 16.7 million tokens."""
_OFFSET_MASK = np.uint64(2**OFFSET_BITS - 1)

_MERGE_RATIO = 4
_MIN_DEAD_TO_COMPACT = 4096
_MAX_PENDING = 8192


class _Run(NamedTuple):
    """Entries sorted by hash; equal hashes keep ascending postings."""

    hashes: Hashes
    postings: npt.NDArray[np.uint64]


class PostingRanges(NamedTuple):
    """Where the postings of ``Q`` looked-up hashes lie: one row per run, oldest run first."""

    runs: list[_Run]
    low: npt.NDArray[np.int64]
    """``[R, Q]``."""
    high: npt.NDArray[np.int64]
    """``[R, Q]``."""

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """Postings per query, ``[Q]``, those of removed chunks included."""
        counts: npt.NDArray[np.int64] = (self.high - self.low).sum(axis=0)
        return counts

    def gather(self, queries: Positions) -> tuple[Positions, npt.NDArray[np.uint64]]:
        """All postings of some queries, as (query number, posting) pairs."""
        owners, postings = [], []
        for run, low, high in zip(self.runs, self.low, self.high, strict=True):
            lengths = (high - low)[queries]
            total = int(lengths.sum())
            if not total:
                continue
            ends = np.cumsum(lengths)
            starts = np.repeat(low[queries] - (ends - lengths), lengths)
            owners.append(np.repeat(queries, lengths))
            postings.append(run.postings[starts + np.arange(total)])
        if not owners:
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.uint64)
        return np.concatenate(owners), np.concatenate(postings)

    def first(self, query: int, limit: int) -> npt.NDArray[np.uint64]:
        """At most ``limit`` postings of one query, ascending."""
        parts: list[npt.NDArray[np.uint64]] = []
        for part in self.slices(query):
            parts.append(part[:limit])
            limit -= parts[-1].size
            if limit <= 0:
                break
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.uint64)

    def contains(self, query: int, wanted: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
        """Which of the ``wanted`` postings belong to one query."""
        found = np.zeros(wanted.size, dtype=np.bool_)
        for part in self.slices(query):
            at = np.searchsorted(part, wanted)
            at[at == part.size] = 0
            found |= part[at] == wanted
        return found

    def slices(self, query: int) -> Iterator[npt.NDArray[np.uint64]]:
        """Non-empty posting arrays of one query, each ascending, in ascending order overall."""
        for run, low, high in zip(self.runs, self.low, self.high, strict=True):
            if high[query] > low[query]:
                yield run.postings[low[query] : high[query]]


def split_postings(postings: npt.NDArray[np.uint64]) -> tuple[Positions, Positions]:
    """Chunk numbers and offsets of postings, both int64."""
    serials = (postings >> np.uint64(OFFSET_BITS)).astype(np.int64)
    return serials, (postings & _OFFSET_MASK).astype(np.int64)


class FingerprintIndex:
    """Multi-map from 64-bit hashes to postings. Not thread-safe; the matcher holds the lock.

    Chunk numbers must be added in ascending order: that keeps postings of equal hashes sorted
    through every merge.
    """

    def __init__(self) -> None:
        self._runs: list[_Run] = []
        self._pending: list[_Run] = []
        self._dead: set[int] = set()
        self._dead_entries = 0
        self._entries = 0
        self._num_pending = 0

    @property
    def num_entries(self) -> int:
        """Live fingerprints."""
        return self._entries - self._dead_entries

    @property
    def num_bytes(self) -> int:
        """Memory of the arrays, waiting and dead entries included."""
        return sum(run.hashes.nbytes + run.postings.nbytes for run in self._runs + self._pending)

    def add(self, serial: int, hashes: Hashes, offsets: Positions) -> None:
        """Add the fingerprints of one chunk; ``serial`` must be the largest so far."""
        if not hashes.size:
            return
        postings = offsets.astype(np.uint64) | np.uint64(serial << OFFSET_BITS)
        self._pending.append(_Run(hashes, postings))
        self._num_pending += int(hashes.size)
        self._entries += int(hashes.size)
        if self._num_pending > _MAX_PENDING:
            self._flush()

    def remove(self, serial: int, num_entries: int) -> bool:
        """Mark a chunk's fingerprints dead; ``True`` if that set off a compaction."""
        self._dead.add(serial)
        self._dead_entries += num_entries
        live = self._entries - self._dead_entries
        if self._dead_entries <= max(_MIN_DEAD_TO_COMPACT, live // 2):
            return False
        self.compact()
        return True

    def revive(self, serial: int, num_entries: int) -> None:
        """Take back a :meth:`remove` that no compaction has followed."""
        self._dead.remove(serial)
        self._dead_entries -= num_entries

    def look_up(self, hashes: Hashes) -> PostingRanges:
        """Find the postings of ``hashes`` (uint64 ``[Q]``)."""
        self._flush()
        shape = (len(self._runs), hashes.size)
        low, high = np.empty(shape, dtype=np.int64), np.empty(shape, dtype=np.int64)
        # Sorted queries walk the array in one direction, which the caches like.
        order = np.argsort(hashes)
        ordered = hashes[order]
        for row, run in enumerate(self._runs):
            low[row, order] = np.searchsorted(run.hashes, ordered, side="left")
            high[row, order] = np.searchsorted(run.hashes, ordered, side="right")
        return PostingRanges(self._runs, low, high)

    def compact(self) -> None:
        """Merge everything into one run without dead entries."""
        self._flush()
        while len(self._runs) > 1:
            self._merge_last()
        if self._dead and self._runs:
            self._runs = [self._without_dead(self._runs[0])]
        self._runs = [run for run in self._runs if run.hashes.size]
        self._dead.clear()
        self._entries = sum(int(run.hashes.size) for run in self._runs)
        self._dead_entries = 0

    def entries(self) -> tuple[Hashes, npt.NDArray[np.uint64]]:
        """All live entries as (hashes, postings), sorted by posting; for integrity checks."""
        everything = [self._without_dead(run) for run in self._runs + self._pending]
        hashes = np.concatenate([run.hashes for run in everything] or [np.zeros(0, np.uint64)])
        postings = np.concatenate([run.postings for run in everything] or [np.zeros(0, np.uint64)])
        order = np.argsort(postings)
        return hashes[order], postings[order]

    def is_sorted(self) -> bool:
        """Whether every run is ordered by (hash, posting), which all searches rely on."""
        for run in self._runs:
            before, after = run.hashes[:-1], run.hashes[1:]
            rising = run.postings[:-1] < run.postings[1:]
            if not bool(np.all((before < after) | ((before == after) & rising))):
                return False
        return True

    def _flush(self) -> None:
        if not self._pending:
            return
        hashes = np.concatenate([run.hashes for run in self._pending])
        postings = np.concatenate([run.postings for run in self._pending])
        self._pending.clear()
        self._num_pending = 0
        order = np.argsort(hashes, kind="stable")
        # A new list: ranges handed out before keep the old one.
        self._runs = [*self._runs, _Run(hashes[order], postings[order])]
        while (
            len(self._runs) > 1
            and self._runs[-2].hashes.size <= _MERGE_RATIO * self._runs[-1].hashes.size
        ):
            self._merge_last()

    def _merge_last(self) -> None:
        *rest, old, new = self._runs
        # side="right" puts newer entries behind older ones of equal hash: postings stay ascending.
        at = np.searchsorted(old.hashes, new.hashes, side="right")
        at += np.arange(at.size)
        from_old = np.ones(old.hashes.size + new.hashes.size, dtype=np.bool_)
        from_old[at] = False
        merged = _Run(np.empty(from_old.size, np.uint64), np.empty(from_old.size, np.uint64))
        for target, olds, news in zip(merged, old, new, strict=True):
            target[at] = news
            target[from_old] = olds
        self._runs = [*rest, merged]

    def _without_dead(self, run: _Run) -> _Run:
        if not self._dead:
            return run
        dead = np.fromiter(self._dead, dtype=np.uint64, count=len(self._dead))
        keep = ~np.isin(run.postings >> np.uint64(OFFSET_BITS), dead)
        return _Run(run.hashes[keep], run.postings[keep])
