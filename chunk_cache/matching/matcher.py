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
from chunk_cache.matching.fingerprint_index import OFFSET_BITS, FingerprintIndex, split_postings
from chunk_cache.matching.hashing import Fingerprinter
from chunk_cache.matching.scan import IndexedChunk, PromptScan
from chunk_cache.spans import Match

_MAX_TOKENS = 2**OFFSET_BITS - 1


class MatchResult(NamedTuple):
    """What one scan found."""

    matches: list[Match]
    """Disjoint, in prompt order."""
    runs: list[Match]
    """All maximal runs of at least ``min_match`` tokens that were verified; they may overlap."""
    truncated: bool
    """A limit cut candidates: the guarantee does not hold for this prompt (see the class)."""


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

    How it works: chunks and prompts are fingerprinted alike (:class:`Fingerprinter`). A hash found
    on both sides names a chunk and a shift; the whole overlap at that shift is then compared, which
    gives its maximal runs at once (:class:`PromptScan`). :func:`longest_cover` picks among the runs.

    Parameters
    ----------
    min_match : int
        ``L``, shortest run that must be found, tokens.
    max_postings : int
        See Limit.
    max_alignments : int
        See Limit.
    min_piece : int
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
        self._fingerprint = Fingerprinter(min_match)
        self._lock = threading.RLock()
        self._index = FingerprintIndex()
        self._chunks: dict[int, IndexedChunk] = {}
        self._serials: dict[ChunkKey, int] = {}
        self._next_serial = 0
        # Removed, but still in the index. A popular chunk that is evicted and rebuilt again and
        # again must not leave a trail of dead fingerprints behind: it gets its old ones back.
        self._removed: dict[ChunkKey, tuple[int, IndexedChunk]] = {}

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
        return self._index.num_bytes + self._fingerprint.num_bytes

    def add(self, key: ChunkKey, token_ids: Iterable[int] | npt.NDArray[Any]) -> bool:
        """Add a chunk.

        Parameters
        ----------
        key : ChunkKey
            Its key; the namespace decides who can find it.
        token_ids : iterable of int or ndarray
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
            hashes, offsets = self._fingerprint(ids, key.namespace)
            serial = self._next_serial
            self._next_serial += 1
            self._index.add(serial, hashes, offsets)
            self._chunks[serial] = IndexedChunk(key, ids, int(offsets.size))
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
        prompt_ids : iterable of int or ndarray
            int ``[N]``; values that are no token ids (image pads) match nothing.
        context : KVContext or str
            The asking engine's context or its namespace; only chunks of it are found.
        """
        ids = as_prompt_ids(prompt_ids)
        namespace = context if isinstance(context, str) else context.namespace
        if ids.size > _MAX_TOKENS:
            raise ChunkCacheError(f"prompt of {ids.size} tokens: allowed is at most {_MAX_TOKENS}")
        with self._lock:
            if ids.size < self.min_match or not self._chunks:
                return MatchResult([], [], False)
            scan = PromptScan(
                ids,
                namespace,
                self._index,
                self._chunks,
                self._fingerprint,
                min_match=self.min_match,
                max_postings=self.max_postings,
                max_alignments=self.max_alignments,
            )
            scan.run()
            cover = longest_cover(scan.runs, min_piece=self.min_piece)
            return MatchResult(cover, scan.runs, scan.truncated)

    def check_integrity(self, expected: Mapping[ChunkKey, TokenIds] | None = None) -> None:
        """Check that the index is what the chunks say, by fingerprinting them all again.

        Parameters
        ----------
        expected : mapping of ChunkKey to ndarray, optional
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
                own_hashes, offsets = self._fingerprint(chunk.ids, chunk.key.namespace)
                part = slice(at, at + offsets.size)
                serials, found = split_postings(postings[part])
                if (
                    not np.array_equal(found, offsets)
                    or not np.array_equal(hashes[part], own_hashes)
                    or bool(np.any(serials != serial))
                ):
                    raise IntegrityError(f"matcher: fingerprints of {chunk.key} are not its own")
                at += int(offsets.size)
            if at != hashes.size or at != self._index.num_entries:
                raise IntegrityError("matcher: fingerprints of unknown chunks, or a wrong count")
            if not self._index.is_sorted():
                raise IntegrityError("matcher: a run of the index is not sorted")
