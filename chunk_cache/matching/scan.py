"""One prompt's scan of the index: fingerprints to alignments, alignments to verified runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from chunk_cache.keys import ChunkKey, TokenIds
from chunk_cache.matching.fingerprint_index import (
    OFFSET_BITS,
    FingerprintIndex,
    PostingRanges,
    split_postings,
)
from chunk_cache.matching.hashing import Fingerprinter, Positions
from chunk_cache.spans import Match

# Of a frequent fingerprint so many places are ranked, and so many of them followed. The ranking is
# what finds the right one; the number followed is what a prompt of one repeated token costs.
_RANKED_POSTINGS = 1024
_FOLLOWED_POSTINGS = 16
_NEIGHBOURS = (-8, -4, -2, -1, 1, 2, 4, 8)


class IndexedChunk(NamedTuple):
    """A chunk whose fingerprints are in the index."""

    key: ChunkKey
    ids: TokenIds
    num_fingerprints: int


class PromptScan:
    """State of one scan; the matcher holds its lock for as long as it lives.

    Parameters
    ----------
    ids : ndarray
        int64 ``[N]``, the prompt.
    namespace : str
        Only chunks of it are found.
    index : FingerprintIndex
        Fingerprints of all chunks.
    chunks : mapping of int to IndexedChunk
        The chunks by their number in `index`; one that is missing was removed.
    fingerprint : Fingerprinter
        What the chunks were fingerprinted by.
    min_match, max_postings, max_alignments : int
        As of :class:`ChunkMatcher`.

    Attributes
    ----------
    runs : list of Match
        All maximal runs of at least ``min_match`` tokens that were verified; they may overlap.
    truncated : bool
        A limit cut candidates.
    """

    def __init__(
        self,
        ids: npt.NDArray[np.int64],
        namespace: str,
        index: FingerprintIndex,
        chunks: Mapping[int, IndexedChunk],
        fingerprint: Fingerprinter,
        *,
        min_match: int,
        max_postings: int,
        max_alignments: int,
    ) -> None:
        # Ids outside int32 become -1, which no chunk holds: comparisons then stay in int32.
        inside = (ids >= 0) & (ids <= np.iinfo(np.int32).max)
        self._ids = np.where(inside, ids, -1).astype(np.int32)
        self._namespace = namespace
        self._index = index
        self._chunks = chunks
        self._fingerprint = fingerprint
        self._min_match = min_match
        self._max_postings = max_postings
        self._max_alignments = max_alignments
        self._covered = np.zeros(ids.size, dtype=np.bool_)
        self._verified: set[tuple[int, int]] = set()
        self.runs: list[Match] = []
        self.truncated = False

    def run(self) -> None:
        """Fill :attr:`runs`: rare fingerprints first, frequent ones where nothing covers yet."""
        hashes, places = self._fingerprint(self._ids, self._namespace)
        ranges = self._index.look_up(hashes)
        counts = ranges.counts
        light = np.flatnonzero((counts > 0) & (counts <= self._max_postings))
        self._follow_light(ranges, light, places)
        heavy = np.flatnonzero(counts > self._max_postings)
        if heavy.size:
            self._follow_heavy(ranges, heavy, places)

    def _follow_light(self, ranges: PostingRanges, queries: Positions, places: Positions) -> None:
        """Verify every alignment that a rare fingerprint points to."""
        if not queries.size:
            return
        owners, postings = ranges.gather(queries)
        serials, offsets = split_postings(postings)
        # One int64 for (chunk, shift); the shift is in (-2**24, 2**24).
        shifts = places[owners] - offsets + (1 << OFFSET_BITS)
        pairs, votes = np.unique(serials << (OFFSET_BITS + 1) | shifts, return_counts=True)
        limit = self._max_alignments
        if pairs.size > limit:
            self.truncated = True
            pairs = pairs[np.argsort(-votes, kind="stable")[:limit]]
        for pair in pairs.tolist():
            shift = (pair & ((2 << OFFSET_BITS) - 1)) - (1 << OFFSET_BITS)
            self._verify(pair >> (OFFSET_BITS + 1), shift)

    def _follow_heavy(self, ranges: PostingRanges, queries: Positions, places: Positions) -> None:
        """Follow frequent fingerprints where the prompt is not covered yet, best places first."""
        window = self._fingerprint.window_tokens
        self.truncated = True  # a run of a skipped one may reach further than what covers it
        reach = 0  # from the last place looked at to here everything is covered
        for query in queries.tolist():
            place = int(places[query])
            if place + window > reach:
                behind = self._covered[place:]
                gap = int(behind.argmin())
                reach = place + (behind.size if behind[gap] else gap)
            if place + window <= reach:
                continue
            postings = self._best_postings(ranges, query, places)
            for serial, offset in zip(*(part.tolist() for part in postings), strict=True):
                if len(self._verified) >= self._max_alignments:
                    return
                self._verify(serial, place - offset)

    def _best_postings(
        self, ranges: PostingRanges, query: int, places: Positions
    ) -> tuple[Positions, Positions]:
        postings = ranges.first(query, _RANKED_POSTINGS)
        alive = [serial in self._chunks for serial in split_postings(postings)[0].tolist()]
        postings = postings[alive]
        votes = np.zeros(postings.size, dtype=np.int64)
        for step in _NEIGHBOURS:
            other = query + step
            if 0 <= other < places.size:
                # In a common run the neighbour lies as far away in the chunk as in the prompt.
                # Offsets that would leave the chunk wrap into another chunk's and are found there
                # only by accident: a wrong vote costs a comparison.
                away = np.array(places[other] - places[query]).astype(np.uint64)
                votes += ranges.contains(other, postings + away)
        best = np.argsort(-votes, kind="stable")[:_FOLLOWED_POSTINGS]
        return split_postings(postings[best])

    def _verify(self, serial: int, shift: int) -> None:
        """Compare a chunk laid at prompt position ``shift`` and keep its maximal runs."""
        chunk = self._chunks.get(serial)
        if chunk is None or (serial, shift) in self._verified:
            return  # removed, its fingerprints not compacted away yet; or seen
        if chunk.key.namespace != self._namespace:
            return
        self._verified.add((serial, shift))
        begin, end = max(0, shift), min(self._ids.size, shift + chunk.ids.size)
        if end - begin < self._min_match:
            return
        equal = self._ids[begin:end] == chunk.ids[begin - shift : end - shift]
        for start, stop in _true_runs(equal, self._min_match):
            start, stop = start + begin, stop + begin
            self.runs.append(Match(start, stop, chunk.key, start - shift))
            self._covered[start:stop] = True


def _true_runs(flags: npt.NDArray[np.bool_], min_length: int) -> list[tuple[int, int]]:
    """Maximal runs of ``True`` of at least ``min_length``."""
    if flags.all():
        return [(0, int(flags.size))] if flags.size >= min_length else []
    walls = np.concatenate(([-1], np.flatnonzero(~flags), [flags.size]))
    long = np.flatnonzero(np.diff(walls) > min_length)
    return [(int(walls[i]) + 1, int(walls[i + 1])) for i in long]
