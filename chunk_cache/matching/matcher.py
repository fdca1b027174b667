"""Find stored chunks at any offset of a plain prompt, verified token by token."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from chunk_cache.errors import ChunkCacheError, IntegrityError
from chunk_cache.keys import ChunkKey, KVContext, TokenIds, as_prompt_ids, as_token_ids
from chunk_cache.matching.cover import longest_cover
from chunk_cache.matching.fingerprint_index import (
    OFFSET_BITS,
    FingerprintIndex,
    PostingRanges,
    split_postings,
)
from chunk_cache.matching.hashing import WindowHasher, winnow
from chunk_cache.spans import Match

_MAX_TOKENS = 2**OFFSET_BITS - 1
# Of a frequent fingerprint so many places are ranked, and so many of them followed. The ranking is
# what finds the right one; the number followed is what a prompt of one repeated token costs.
_RANKED_POSTINGS = 1024
_FOLLOWED_POSTINGS = 16
_NEIGHBOURS = (-8, -4, -2, -1, 1, 2, 4, 8)


class MatchResult(NamedTuple):
    """What one scan found."""

    matches: list[Match]
    """Disjoint, in prompt order."""
    runs: list[Match]
    """All maximal runs of at least ``min_match`` tokens that were verified; they may overlap."""
    truncated: bool
    """A limit cut candidates: the guarantee does not hold for this prompt (see the class)."""


class _Chunk(NamedTuple):
    key: ChunkKey
    ids: TokenIds
    num_fingerprints: int


class ChunkMatcher:
    """Index of stored chunks that finds their runs in prompts. Thread-safe.

    **Guarantee.** Every maximal common run of at least ``min_match`` tokens between the prompt and
    a stored chunk of the same namespace is found, at any offset in either, and nothing shorter is
    reported. Chunks shorter than ``min_match`` are therefore only ever matched by explicit spans.

    **Limit.** A fingerprint that occurs more than ``max_postings`` times (boiler-plate in very many
    chunks, one token repeated; chunks removed a moment ago still count) is followed only where
    nothing else covers the prompt, and then in the 16 places, of the 1024 oldest, whose
    neighbourhood agrees best; no more than ``max_alignments`` (chunk, shift) pairs are verified per
    prompt. When that cut anything, ``truncated`` is set: what is reported is still verified, but a
    run may be missing or a shorter one taken for it.

    How it works: windows of ``min_match // 2`` tokens are hashed; of every
    ``min_match - min_match // 2 + 1`` consecutive ones the smallest hash is kept, on both sides.
    A hash found on both sides names a chunk and a shift; the whole overlap at that shift is then
    compared, which gives its maximal runs at once. :func:`longest_cover` picks among the runs.

    Parameters
    ----------
    min_match
        ``L``, shortest run that must be found, tokens.
    max_postings
        See Limit.
    max_alignments
        See Limit.
    min_piece
        Wanted length of trimmed pieces, tokens; see :func:`longest_cover`.

    Raises
    ------
    ChunkCacheError
        For settings below 1.
    """

    def __init__(
        self,
        *,
        min_match: int = 64,
        max_postings: int = 64,
        max_alignments: int = 1024,
        min_piece: int = 16,
    ) -> None:
        settings = {
            "min_match": min_match,
            "max_postings": max_postings,
            "max_alignments": max_alignments,
            "min_piece": min_piece,
        }
        for name, value in settings.items():
            if value < 1:
                raise ChunkCacheError(f"{name}={value}: allowed is >= 1")
        self.min_match = min_match
        self.max_postings = max_postings
        self.max_alignments = max_alignments
        self.min_piece = min_piece
        window = max(1, min_match // 2)
        self._hasher = WindowHasher(window)
        self._num_hashes = min_match - window + 1
        self._lock = threading.RLock()
        self._index = FingerprintIndex()
        self._chunks: dict[int, _Chunk] = {}
        self._serials: dict[ChunkKey, int] = {}
        self._next_serial = 0
        # Removed, but still in the index. A popular chunk that is evicted and rebuilt again and
        # again must not leave a trail of dead fingerprints behind: it gets its old ones back.
        self._removed: dict[ChunkKey, tuple[int, _Chunk]] = {}

    def __len__(self) -> int:
        return len(self._serials)

    def __contains__(self, key: ChunkKey) -> bool:
        return key in self._serials

    @property
    def num_fingerprints(self) -> int:
        """Live fingerprints."""
        return self._index.num_entries

    @property
    def num_bytes(self) -> int:
        """Memory of the index arrays, bytes; token ids are shared with the records."""
        return self._index.num_bytes + self._hasher.num_bytes

    def add(self, key: ChunkKey, token_ids: Iterable[int] | npt.NDArray[Any]) -> bool:
        """Add a chunk.

        Parameters
        ----------
        key
            Its key; the namespace decides who can find it.
        token_ids
            Its ids. A read-only int32 array is shared, not copied.

        Returns
        -------
        bool
            ``False`` if it was there already.
        """
        ids = as_token_ids(token_ids)
        if ids.size > _MAX_TOKENS:
            raise ChunkCacheError(f"chunk of {ids.size} tokens: allowed is at most {_MAX_TOKENS}")
        with self._lock:
            if key in self._serials:
                return False
            if key in self._removed:
                serial, chunk = self._removed.pop(key)
                if np.array_equal(chunk.ids, ids):
                    self._index.revive(serial, chunk.num_fingerprints)
                    self._chunks[serial] = chunk._replace(ids=ids)
                    self._serials[key] = serial
                    return True
            hashes = self._hasher(ids, _seed(key.namespace))
            offsets = winnow(hashes, self._num_hashes)
            serial = self._next_serial
            self._next_serial += 1
            self._index.add(serial, hashes[offsets], offsets)
            self._chunks[serial] = _Chunk(key, ids, int(offsets.size))
            self._serials[key] = serial
            return True

    def remove(self, key: ChunkKey) -> bool:
        """Remove a chunk; ``False`` if it was not there."""
        with self._lock:
            serial = self._serials.pop(key, None)
            if serial is None:
                return False
            chunk = self._chunks.pop(serial)
            if not chunk.num_fingerprints:
                return True
            self._removed[key] = serial, chunk
            if self._index.remove(serial, chunk.num_fingerprints):
                self._removed.clear()
            return True

    def match(
        self, prompt_ids: Iterable[int] | npt.NDArray[Any], context: KVContext | str
    ) -> MatchResult:
        """Find stored chunks in a prompt.

        Parameters
        ----------
        prompt_ids
            int ``[N]``; values that are no token ids (image pads) match nothing.
        context
            The asking engine's context or its namespace; only chunks of it are found.
        """
        ids = as_prompt_ids(prompt_ids)
        namespace = context if isinstance(context, str) else context.namespace
        if ids.size > _MAX_TOKENS:
            raise ChunkCacheError(f"prompt of {ids.size} tokens: allowed is at most {_MAX_TOKENS}")
        with self._lock:
            if ids.size < self.min_match or not self._chunks:
                return MatchResult([], [], False)
            return _Scan(self, ids, namespace).run()

    def check_integrity(self, expected: Mapping[ChunkKey, TokenIds] | None = None) -> None:
        """Check that the index is what the chunks say, by fingerprinting them all again.

        Parameters
        ----------
        expected
            The chunks that ought to be here, if the caller knows.

        Raises
        ------
        IntegrityError
            Naming the first contradiction.
        """
        with self._lock:
            if {key: self._chunks[serial].key for key, serial in self._serials.items()} != {
                key: key for key in self._serials
            } or len(self._serials) != len(self._chunks):
                raise IntegrityError("matcher: chunk table and key table differ")
            if expected is not None:
                if set(expected) != set(self._serials):
                    raise IntegrityError("matcher: holds other chunks than the store")
                for key, ids in expected.items():
                    if not np.array_equal(self._chunks[self._serials[key]].ids, ids):
                        raise IntegrityError(f"matcher: {key} has other token ids than the store")
            hashes, postings = self._index.entries()
            at = 0
            for serial in sorted(self._chunks):
                chunk = self._chunks[serial]
                all_hashes = self._hasher(chunk.ids, _seed(chunk.key.namespace))
                offsets = winnow(all_hashes, self._num_hashes)
                part = slice(at, at + offsets.size)
                serials, found = split_postings(postings[part])
                if (
                    not np.array_equal(found, offsets)
                    or not np.array_equal(hashes[part], all_hashes[offsets])
                    or bool(np.any(serials != serial))
                ):
                    raise IntegrityError(f"matcher: fingerprints of {chunk.key} are not its own")
                at += int(offsets.size)
            if at != hashes.size or at != self._index.num_entries:
                raise IntegrityError("matcher: fingerprints of unknown chunks, or a wrong count")
            if not self._index.is_sorted():
                raise IntegrityError("matcher: a run of the index is not sorted")


class _Scan:
    """One prompt's scan: state that lives as long as the call."""

    def __init__(self, matcher: ChunkMatcher, ids: npt.NDArray[np.int64], namespace: str) -> None:
        self.matcher = matcher
        self.namespace = namespace
        # Ids outside int32 become -1, which no chunk holds: comparisons then stay in int32.
        inside = (ids >= 0) & (ids <= np.iinfo(np.int32).max)
        self.ids = np.where(inside, ids, -1).astype(np.int32)
        self.covered = np.zeros(ids.size, dtype=np.bool_)
        self.runs: list[Match] = []
        self.verified: set[tuple[int, int]] = set()
        self.truncated = False

    def run(self) -> MatchResult:
        matcher = self.matcher
        hashes = matcher._hasher(self.ids, _seed(self.namespace))
        places = winnow(hashes, matcher._num_hashes)
        ranges = matcher._index.look_up(hashes[places])
        counts = ranges.counts
        light = np.flatnonzero((counts > 0) & (counts <= matcher.max_postings))
        self._follow_light(ranges, light, places)
        heavy = np.flatnonzero(counts > matcher.max_postings)
        if heavy.size:
            self._follow_heavy(ranges, heavy, places)
        cover = longest_cover(self.runs, min_piece=matcher.min_piece)
        return MatchResult(cover, self.runs, self.truncated)

    def _follow_light(
        self, ranges: PostingRanges, queries: npt.NDArray[np.int64], places: npt.NDArray[np.int64]
    ) -> None:
        """Verify every alignment that a rare fingerprint points to."""
        if not queries.size:
            return
        owners, postings = ranges.gather(queries)
        serials, offsets = split_postings(postings)
        # One int64 for (chunk, shift); the shift is in (-2**24, 2**24).
        shifts = places[owners] - offsets + (1 << OFFSET_BITS)
        pairs, votes = np.unique(serials << (OFFSET_BITS + 1) | shifts, return_counts=True)
        limit = self.matcher.max_alignments
        if pairs.size > limit:
            self.truncated = True
            pairs = pairs[np.argsort(-votes, kind="stable")[:limit]]
        for pair in pairs.tolist():
            shift = (pair & ((2 << OFFSET_BITS) - 1)) - (1 << OFFSET_BITS)
            self._verify(pair >> (OFFSET_BITS + 1), shift)

    def _follow_heavy(
        self, ranges: PostingRanges, queries: npt.NDArray[np.int64], places: npt.NDArray[np.int64]
    ) -> None:
        """Follow frequent fingerprints where the prompt is not covered yet, best places first."""
        window = self.matcher._hasher.num_tokens
        self.truncated = True  # a run of a skipped one may reach further than what covers it
        reach = 0  # from the last place looked at to here everything is covered
        for query in queries.tolist():
            place = int(places[query])
            if place + window > reach:
                behind = self.covered[place:]
                gap = int(behind.argmin())
                reach = place + (behind.size if behind[gap] else gap)
            if place + window <= reach:
                continue
            postings = self._best_postings(ranges, query, places)
            for serial, offset in zip(*(part.tolist() for part in postings), strict=True):
                if len(self.verified) >= self.matcher.max_alignments:
                    return
                self._verify(serial, place - offset)

    def _best_postings(
        self, ranges: PostingRanges, query: int, places: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        postings = ranges.first(query, _RANKED_POSTINGS)
        chunks = self.matcher._chunks
        alive = [serial in chunks for serial in split_postings(postings)[0].tolist()]
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
        chunk = self.matcher._chunks.get(serial)
        if chunk is None or (serial, shift) in self.verified:
            return  # removed, its fingerprints not compacted away yet; or seen
        if chunk.key.namespace != self.namespace:
            return
        self.verified.add((serial, shift))
        begin, end = max(0, shift), min(self.ids.size, shift + chunk.ids.size)
        if end - begin < self.matcher.min_match:
            return
        equal = self.ids[begin:end] == chunk.ids[begin - shift : end - shift]
        for start, stop in _true_runs(equal, self.matcher.min_match):
            start, stop = start + begin, stop + begin
            self.runs.append(Match(start, stop, chunk.key, start - shift))
            self.covered[start:stop] = True


def _true_runs(flags: npt.NDArray[np.bool_], min_length: int) -> list[tuple[int, int]]:
    """Maximal runs of ``True`` of at least ``min_length``."""
    if flags.all():
        return [(0, int(flags.size))] if flags.size >= min_length else []
    walls = np.concatenate(([-1], np.flatnonzero(~flags), [flags.size]))
    long = np.flatnonzero(np.diff(walls) > min_length)
    return [(int(walls[i]) + 1, int(walls[i + 1])) for i in long]


def _seed(namespace: str) -> int:
    return int(namespace[:16], 16)
