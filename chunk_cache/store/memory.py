"""The in-memory tier: chunk records under a byte budget, looked up by key and found in prompts.

How records come in is told in :mod:`chunk_cache.store.writable`, what stays and what goes in
:mod:`chunk_cache.store.kept`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from chunk_cache.keys import ChunkKey, KVContext, as_prompt_ids
from chunk_cache.records import ChunkKV
from chunk_cache.spans import Match, check_spans, merge_matches
from chunk_cache.store.builds import ChunkState
from chunk_cache.store.lease import Lease
from chunk_cache.store.ledger import Entry
from chunk_cache.store.listing import EntryInfo, Resolution, list_entries
from chunk_cache.store.loading import LoadingChunk
from chunk_cache.store.stats import StoreStats
from chunk_cache.store.writable import WritableStore


class MemoryStore(WritableStore):
    """Chunk records in memory, shared by all requests of a process. Thread-safe.

    The contract in short: a lookup either gives a :class:`Lease` on a record whose token ids were
    compared with the caller's, or ``None``; records in use or pinned are never evicted; of the others
    the tenant that holds most loses first, and the eviction policy says what; one writer builds a key at a
    time; ``bytes_now`` never exceeds the budget.

    Parameters
    ----------
    byte_budget : int
        Upper bound of :attr:`ChunkKV.num_bytes` over all records, bytes.
    matcher : ChunkMatcher, optional
        Finds stored chunks in plain prompts; by default one with its default settings. The store
        keeps it in step with what is READY.
    checksums : bool
        Take a checksum of every record at commit (about 1 ms per MB), so that :meth:`verify` can
        find a stray writer.
    build_timeout_s : float
        A build that was not committed for this long loses its right, seconds.
    retry_failed_s : float
        Back-off before a FAILED key may be built again, seconds.
    clock : callable
        Monotonic seconds; replaced in tests.
    slab : bool
        Keep the tensors in one buffer of the budget's size, page-locked where there is a GPU (:class:`~.slab.Slab`):
        a record is copied once more when it is committed, and what is committed stays the caller's.
    eviction : EvictionPolicy, optional
        Order of a tenant's victims; by default the least recently used first. The store makes all calls to it.

    Raises
    ------
    ChunkCacheError
        For a budget or a time that is not positive.
    """

    def __len__(self) -> int:
        """Count the READY records."""
        return len(self._ledger.entries)

    # -- looking up ---------------------------------------------------------------------------

    def acquire(
        self,
        key: ChunkKey,
        token_ids: Iterable[int] | npt.NDArray[Any],
        *,
        chunk_offset: int = 0,
    ) -> Lease | None:
        """Lease the record of ``key`` after comparing token ids.

        Parameters
        ----------
        key : ChunkKey
            Key of the whole chunk.
        token_ids : iterable of int or ndarray
            Ids of the run that will be used: the whole chunk, or a part of it.
        chunk_offset : int
            Where in the chunk the run starts.

        Returns
        -------
        Lease or None
            ``None`` is a miss: absent, still building, failed, or other tokens under this key. The record of a
            LOADING key is a :class:`LoadingChunk`: whoever reads its layers waits for them.
        """
        ids = np.asarray(token_ids if isinstance(token_ids, np.ndarray) else list(token_ids))
        with self._lock:
            entry = self._ledger.entries.get(key) or self._loading(key)
            if entry is None:
                self._count_miss(key)
                return None
            stored = entry.record.token_ids[chunk_offset : chunk_offset + ids.size]
            if chunk_offset < 0 or ids.size == 0 or not np.array_equal(stored, ids):
                self._stats.misses += 1
                self._stats.misses_tokens_differ += 1
                return None
            whole = ids.size == entry.record.num_tokens
            self._stats.hits += 1
            self._stats.hits_whole += whole
            self._stats.hits_partial += not whole
            self._stats.tokens_hit += int(ids.size)
            entry.hits += 1
            entry.used_at = self._clock()
            self._ledger.take(entry)
            return Lease(entry.record, chunk_offset, int(ids.size), lambda: self._release(entry))

    def _loading(self, key: ChunkKey) -> Entry | None:
        build = self._builds.building.get(key)
        entry = None if build is None else build.loading
        if entry is None or not (isinstance(entry.record, LoadingChunk) and entry.record.is_usable):
            return None
        return entry

    def can_lease(self, key: ChunkKey) -> bool:
        """Whether :meth:`acquire` would give a record: it is READY, or LOADING and worth waiting for."""
        with self._lock:
            return key in self._ledger.entries or self._loading(key) is not None

    def touch(self, key: ChunkKey) -> bool:
        """Note that a record is about to be used, without counting a look-up; ``False`` if it is not READY."""
        with self.borrow(key) as record:
            return record is not None

    def note_absent(self, number: int) -> None:
        """Count misses of chunks that were looked for where no key is known to :meth:`acquire`: by their place in a prompt."""
        with self._lock:
            self._stats.misses += number
            self._stats.misses_absent += number

    def forget_counts(self) -> None:
        """Count from nothing again, as a store that was just made; what it holds stays."""
        with self._lock:
            for field in dataclasses.fields(self._stats):
                setattr(self._stats, field.name, field.default)

    def _count_miss(self, key: ChunkKey) -> None:
        self._expire_builds()
        state = self._builds.state(key)
        self._stats.misses += 1
        self._stats.misses_building += state in (ChunkState.BUILDING, ChunkState.LOADING)
        self._stats.misses_failed += state is ChunkState.FAILED
        self._stats.misses_absent += state is None

    def acquire_matches(
        self, prompt_ids: Iterable[int] | npt.NDArray[Any], matches: Sequence[Match]
    ) -> list[tuple[Match, Lease]]:
        """Lease every match that is still there; the others are left out (they are misses)."""
        ids = as_prompt_ids(prompt_ids)
        leased: list[tuple[Match, Lease]] = []
        try:
            for match in matches:
                run = ids[match.prompt_start : match.prompt_end]
                lease = self.acquire(match.key, run, chunk_offset=match.chunk_offset)
                if lease is not None:
                    leased.append((match, lease))
        except BaseException:
            for _, lease in leased:
                lease.release()
            raise
        return leased

    @contextlib.contextmanager
    def borrow(self, key: ChunkKey) -> Iterator[ChunkKV | None]:
        """Hold a record for export or inspection, without counting a hit; ``None`` if not READY."""
        with self._lock:
            entry = self._ledger.entries.get(key)
            if entry is not None:
                self._ledger.take(entry)
        try:
            # READY, so it is whole.
            yield entry.record if entry is not None and isinstance(entry.record, ChunkKV) else None
        finally:
            if entry is not None:
                self._release(entry)

    def _release(self, entry: Entry) -> None:
        with self._lock:
            self._ledger.give_back(entry, self._clock())

    # -- finding chunks in prompts ------------------------------------------------------------

    def match(
        self, prompt_ids: Iterable[int] | npt.NDArray[Any], context: KVContext | str
    ) -> list[Match]:
        """Find stored chunks in a plain prompt, as :meth:`ChunkMatcher.match` does, and count."""
        ids = as_prompt_ids(prompt_ids)
        found = self.matcher.match(ids, context)
        with self._lock:
            self._stats.prompts_matched += 1
            self._stats.tokens_scanned += int(ids.size)
            self._stats.tokens_matched += sum(match.num_tokens for match in found.matches)
            self._stats.matches_truncated += found.truncated
        return found.matches

    def resolve(
        self,
        prompt_ids: Iterable[int] | npt.NDArray[Any],
        context: KVContext | str,
        *,
        spans: Iterable[tuple[int, int]] | None = None,
        automatic: bool = True,
        min_piece: int = 1,
    ) -> Resolution:
        """Turn client spans and automatic finds into one list of disjoint matches.

        Explicit spans come first: each whose whole chunk is READY or LOADING is matched as it stands, and
        automatic matches are trimmed around it. The place of a missing one is open to automatic
        matches (an older, differently cut chunk may cover it); where none is missing, nothing is
        scanned.

        Parameters
        ----------
        prompt_ids : iterable of int or ndarray
            int ``[N]``.
        context : KVContext or str
            Context (or its namespace) of the engine that asks.
        spans : iterable of (int, int), optional
            Explicit ``(start, end)`` positions; see :func:`check_spans`.
        automatic : bool
            Also scan the prompt, if a span is missing or none was given.
        min_piece : int
            Shortest automatic piece worth keeping after trimming, tokens.
        """
        ids = as_prompt_ids(prompt_ids)
        namespace = context if isinstance(context, str) else context.namespace
        explicit: list[Match] = []
        missing: list[tuple[int, int]] = []
        given = check_spans(spans or (), int(ids.size))
        for start, end in given:
            run = ids[start:end]
            if int(run.min()) < 0 or int(run.max()) > np.iinfo(np.int32).max:
                continue  # engine-made ids (image pads): never stored, nothing to build either
            key = ChunkKey.of(namespace, run)
            if self.can_lease(key):
                explicit.append(Match(start, end, key))
            else:
                missing.append((start, end))
        scan = automatic and (missing or not given)
        found = self.match(ids, namespace) if scan else []
        return Resolution(merge_matches(explicit, found, min_piece=min_piece), missing)

    # -- inspecting ---------------------------------------------------------------------------

    def keys(self) -> list[ChunkKey]:
        """Keys of all READY records."""
        with self._lock:
            return list(self._ledger.entries)

    def used_since(self, moment: float) -> list[ChunkKey]:
        """READY keys that were stored or used after a moment of the store's clock."""
        with self._lock:
            return [key for key, e in self._ledger.entries.items() if e.used_at >= moment]

    def ls(self) -> list[EntryInfo]:
        """List READY, BUILDING and FAILED keys, most recently used first."""
        with self._lock:
            self._expire_builds()
            self._room.end_pins()
            return list_entries(self._ledger, self._builds, self._clock())

    def stats(self) -> StoreStats:
        """Return a copy of the counters with the gauges filled in."""
        with self._lock:
            self._room.end_pins()
            return dataclasses.replace(
                self._stats,
                chunks_now=len(self._ledger.entries),
                bytes_now=self._ledger.bytes_now,
                pinned_bytes_now=self._ledger.pinned_bytes,
                in_use_now=self._ledger.num_in_use,
                byte_budget=self._ledger.byte_budget,
            )

    @property
    def free_bytes(self) -> int:
        """What fits without evicting anything, bytes."""
        with self._lock:
            return self._ledger.byte_budget - self._ledger.bytes_now

    def count_corrupt(self) -> None:
        """Count a record that a lower tier found damaged."""
        with self._lock:
            self._stats.corrupt += 1

    def verify(self) -> list[ChunkKey]:
        """Recompute all checksums and drop records that changed.

        Returns
        -------
        list[ChunkKey]
            The damaged ones. Records stored without a checksum cannot be judged and are skipped.
        """
        with self._lock:
            present = [(e, e.record) for e in self._ledger.entries.values()]
        bad: list[ChunkKey] = []
        for entry, record in present:
            if not isinstance(record, ChunkKV) or record.checksum is None or record.verify():
                continue
            with self._lock:
                if self._ledger.entries.get(record.key) is entry:
                    self._room.drop(record.key)
                    self._stats.corrupt += 1
                    bad.append(record.key)
        return bad

    def check_integrity(self, *, expect_idle: bool = False) -> None:
        """Check every invariant of the store; meant for test teardown and ``doctor``.

        Byte and pin accounting, eviction list, the slab's blocks, states that exclude each other, keys
        against token ids, and the matcher's fingerprints against the READY records.

        Parameters
        ----------
        expect_idle : bool
            Also fail if anything is leased or building: a forgotten release.

        Raises
        ------
        IntegrityError
            Naming the first contradiction.
        """
        with self._lock:
            self._ledger.check(expect_idle=expect_idle)
            entries = self._ledger.entries
            self._builds.check(set(entries), expect_idle=expect_idle)
            self._stats.check()
            if self._room.slab is not None:
                stored = [entry.record for entry in entries.values()]
                self._room.slab.check(one for one in stored if isinstance(one, ChunkKV))
            self.matcher.check_integrity({k: e.record.token_ids for k, e in entries.items()})
