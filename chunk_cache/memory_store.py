"""The in-memory tier: chunk records under a byte budget, with leases, pins and one writer a key."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from chunk_cache.builds import BuildTable
from chunk_cache.errors import ChunkCacheError, IntegrityError
from chunk_cache.handles import Build, ChunkState, Lease
from chunk_cache.keys import ChunkKey, KVContext, as_prompt_ids, as_token_ids
from chunk_cache.ledger import Entry, Ledger
from chunk_cache.listing import EntryInfo, Resolution, list_entries
from chunk_cache.matching import ChunkMatcher
from chunk_cache.records import ChunkKV
from chunk_cache.spans import Match, check_spans, merge_matches
from chunk_cache.stats import StoreStats


class MemoryStore:
    """Chunk records in memory, shared by all requests of a process. Thread-safe.

    The contract in short: a lookup either gives a :class:`Lease` on a record whose token ids were
    compared with the caller's, or ``None``; records in use or pinned are never evicted; the least
    recently used of the others go first; one writer builds a key at a time; ``bytes_now`` never
    exceeds the budget.

    Parameters
    ----------
    byte_budget
        Upper bound of :attr:`ChunkKV.num_bytes` over all records, bytes.
    matcher
        Finds stored chunks in plain prompts; by default one with its default settings. The store
        keeps it in step with what is READY.
    checksums
        Take a checksum of every record at commit (about 1 ms per MB), so that :meth:`verify` can
        find a stray writer.
    build_timeout_s
        A build that was not committed for this long loses its right, seconds.
    retry_failed_s
        Back-off before a FAILED key may be built again, seconds.
    clock
        Monotonic seconds; replaced in tests.

    Raises
    ------
    ChunkCacheError
        For a budget or a time that is not positive.
    """

    def __init__(
        self,
        byte_budget: int,
        *,
        matcher: ChunkMatcher | None = None,
        checksums: bool = False,
        build_timeout_s: float = 120.0,
        retry_failed_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if byte_budget <= 0:
            raise ChunkCacheError(f"byte_budget={byte_budget}: give a positive number of bytes")
        if build_timeout_s <= 0 or retry_failed_s < 0:
            raise ChunkCacheError(
                f"build_timeout_s={build_timeout_s}, retry_failed_s={retry_failed_s}: "
                "the first must be positive, the second not negative"
            )
        self.matcher = matcher if matcher is not None else ChunkMatcher()
        self.checksums = checksums
        self._build_timeout_s = build_timeout_s
        self._clock = clock
        self._lock = threading.RLock()
        self._ledger = Ledger(byte_budget)
        self._builds = BuildTable(retry_failed_s)
        self._stats = StoreStats()

    def __len__(self) -> int:
        """Count the READY records."""
        return len(self._ledger.entries)

    # -- looking up ---------------------------------------------------------------------------

    def state(self, key: ChunkKey) -> ChunkState | None:
        """Tell where a key stands, without counting a look-up or touching the LRU order."""
        with self._lock:
            if key in self._ledger.entries:
                return ChunkState.READY
            self._expire_builds()
            return self._builds.state(key)

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
        key
            Key of the whole chunk.
        token_ids
            Ids of the run that will be used: the whole chunk, or a part of it.
        chunk_offset
            Where in the chunk the run starts.

        Returns
        -------
        Lease or None
            ``None`` is a miss: absent, still building, failed, or other tokens under this key.
        """
        ids = np.asarray(token_ids if isinstance(token_ids, np.ndarray) else list(token_ids))
        with self._lock:
            entry = self._ledger.entries.get(key)
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

    def _count_miss(self, key: ChunkKey) -> None:
        self._expire_builds()
        state = self._builds.state(key)
        self._stats.misses += 1
        self._stats.misses_building += state is ChunkState.BUILDING
        self._stats.misses_failed += state is ChunkState.FAILED
        self._stats.misses_absent += state is None

    def acquire_matches(
        self, prompt_ids: Iterable[int] | npt.NDArray[Any], matches: Sequence[Match]
    ) -> list[tuple[Match, Lease]]:
        """Lease every match that is still there; the others are left out (they are misses)."""
        ids = as_prompt_ids(prompt_ids)
        leased: list[tuple[Match, Lease]] = []
        for match in matches:
            run = ids[match.prompt_start : match.prompt_end]
            lease = self.acquire(match.key, run, chunk_offset=match.chunk_offset)
            if lease is not None:
                leased.append((match, lease))
        return leased

    @contextlib.contextmanager
    def borrow(self, key: ChunkKey) -> Iterator[ChunkKV | None]:
        """Hold a record for export or inspection, without counting a hit; ``None`` if not READY."""
        with self._lock:
            entry = self._ledger.entries.get(key)
            if entry is not None:
                self._ledger.take(entry)
        try:
            yield None if entry is None else entry.record
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

        Explicit spans come first: each whose whole chunk is READY is matched as it stands, and
        automatic matches are trimmed around it. The place of a missing one is open to automatic
        matches (an older, differently cut chunk may cover it).

        Parameters
        ----------
        prompt_ids
            int ``[N]``.
        context
            Context (or its namespace) of the engine that asks.
        spans
            Explicit ``(start, end)`` positions; see :func:`check_spans`.
        automatic
            Also scan the prompt.
        min_piece
            Shortest automatic piece worth keeping after trimming, tokens.
        """
        ids = as_prompt_ids(prompt_ids)
        namespace = context if isinstance(context, str) else context.namespace
        explicit: list[Match] = []
        missing: list[tuple[int, int]] = []
        for start, end in check_spans(spans or (), int(ids.size)):
            run = ids[start:end]
            if int(run.min()) < 0 or int(run.max()) > np.iinfo(np.int32).max:
                continue  # engine-made ids (image pads): never stored, nothing to build either
            key = ChunkKey.of(namespace, run)
            if self.state(key) is ChunkState.READY:
                explicit.append(Match(start, end, key))
            else:
                missing.append((start, end))
        found = self.match(ids, namespace) if automatic else []
        return Resolution(merge_matches(explicit, found, min_piece=min_piece), missing)

    # -- writing ------------------------------------------------------------------------------

    def begin_build(
        self,
        key: ChunkKey,
        token_ids: Iterable[int] | npt.NDArray[Any],
        *,
        owner: str = "",
        timeout_s: float | None = None,
    ) -> Build | ChunkState:
        """Ask for the right to build a key.

        Returns
        -------
        Build or ChunkState
            The right, or the state that stands against it: BUILDING (somebody else is at it),
            READY (it is there), FAILED (back-off has not passed).

        Raises
        ------
        ChunkCacheError
            If the key is not that of the token ids.
        """
        ids = as_token_ids(token_ids)
        if ChunkKey.of(key.namespace, ids) != key:
            raise ChunkCacheError(f"key {key} does not belong to these {ids.size} token ids")
        with self._lock:
            self._expire_builds()
            now = self._clock()
            against = self._builds.against(key, now)
            if key in self._ledger.entries:
                against = ChunkState.READY
            if against is not None:
                self._stats.builds_refused += 1
                return against
            deadline = now + (self._build_timeout_s if timeout_s is None else timeout_s)
            build = Build(key, ids, owner, deadline, self._commit, self._abort)
            self._builds.begin(build)
            self._stats.builds_begun += 1
            return build

    def put(self, record: ChunkKV, *, pin: bool = False) -> bool:
        """Store a finished record in one step (import, tests).

        Returns
        -------
        bool
            ``True`` if it is READY now; ``False`` if it was there, is being built, or has no room.
        """
        with self._lock:
            self._builds.failed.pop(record.key, None)  # here it is: no reason to wait any longer
        build = self.begin_build(record.key, record.token_ids, owner="put")
        return isinstance(build, Build) and build.commit(record, pin=pin)

    def release_owner(self, owner: str) -> int:
        """Drop every build of an owner that is gone (an aborted request); returns how many."""
        with self._lock:
            mine = [build for build in self._builds.building.values() if build.owner == owner]
            return sum(build.abort("owner gone", failed=False) for build in mine)

    def _commit(self, build: Build, record: ChunkKV, pin: bool) -> bool:
        if record.key != build.key:
            raise ChunkCacheError(f"record {record.key} committed to the build of {build.key}")
        if self.checksums and record.checksum is None:
            record = record.sealed()  # outside the lock: it reads every byte
        with self._lock:
            self._expire_builds()
            if not self._builds.end(build):
                return False
            if record.num_bytes > self._ledger.byte_budget:
                self._stats.rejected_too_big += 1
                reason = f"{record.num_bytes} bytes, the budget is {self._ledger.byte_budget}"
                self._builds.fail(build.key, reason, self._clock())
                return False
            victims = self._ledger.victims(record.num_bytes)
            if victims is None:
                self._stats.rejected_no_room += 1
                return False
            for key in victims:
                self._stats.evicted += 1
                self._stats.evicted_bytes += self._drop(key).num_bytes
            self.matcher.add(build.key, record.token_ids)
            self._ledger.insert(record, pin, self._clock())
            self._stats.inserted += 1
            return True

    def _abort(self, build: Build, reason: str, failed: bool) -> bool:
        with self._lock:
            if not self._builds.end(build):
                return False
            self._stats.builds_aborted += 1
            if failed:
                self._builds.fail(build.key, reason, self._clock())
            return True

    def _expire_builds(self) -> None:
        if self._builds.building:
            self._stats.builds_expired += self._builds.expire(self._clock())

    def _drop(self, key: ChunkKey) -> ChunkKV:
        self.matcher.remove(key)
        return self._ledger.drop(key)

    # -- eviction and administration ----------------------------------------------------------

    def pin(self, key: ChunkKey) -> bool:
        """Keep a READY record until :meth:`unpin`; ``False`` if it is not READY."""
        return self._set_pinned(key, True)

    def unpin(self, key: ChunkKey) -> bool:
        """Make a record evictable again, as if just used; ``False`` if it is not READY."""
        return self._set_pinned(key, False)

    def _set_pinned(self, key: ChunkKey, pinned: bool) -> bool:
        with self._lock:
            entry = self._ledger.entries.get(key)
            if entry is None:
                return False
            self._ledger.set_pinned(entry, pinned)
            return True

    def evict(self, key: ChunkKey, *, force: bool = False) -> bool:
        """Drop one record by hand.

        Parameters
        ----------
        key
            Which.
        force
            Also drop a pinned one. A record in use is never dropped.

        Returns
        -------
        bool
            ``False`` if it is absent, in use, or pinned without ``force``.
        """
        with self._lock:
            entry = self._ledger.entries.get(key)
            if entry is None or entry.refs or (entry.pinned and not force):
                return False
            self._stats.evicted_by_hand += 1
            self._drop(key)
            return True

    def clear(self) -> int:
        """Drop everything that is neither in use nor pinned; returns how many went."""
        with self._lock:
            return sum(self.evict(key) for key in list(self._ledger.evictable))

    def keys(self) -> list[ChunkKey]:
        """Keys of all READY records."""
        with self._lock:
            return list(self._ledger.entries)

    def find_keys(self, prefix: str) -> list[ChunkKey]:
        """READY keys whose digest starts with ``prefix`` (what a person types)."""
        with self._lock:
            return [key for key in self._ledger.entries if key.digest.startswith(prefix)]

    def ls(self) -> list[EntryInfo]:
        """List READY, BUILDING and FAILED keys, most recently used first."""
        with self._lock:
            self._expire_builds()
            return list_entries(self._ledger, self._builds, self._clock())

    def stats(self) -> StoreStats:
        """Return a copy of the counters with the gauges filled in."""
        with self._lock:
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
            sealed = [e for e in self._ledger.entries.values() if e.record.checksum is not None]
        bad: list[ChunkKey] = []
        for entry in sealed:
            if entry.record.verify():
                continue
            with self._lock:
                if self._ledger.entries.get(entry.record.key) is entry:
                    self._drop(entry.record.key)
                    self._stats.corrupt += 1
                    bad.append(entry.record.key)
        return bad

    def check_integrity(self, *, expect_idle: bool = False) -> None:
        """Check every invariant of the store; meant for test teardown and ``doctor``.

        Byte and pin accounting, eviction list, states that exclude each other, keys against token
        ids, and the matcher's fingerprints against the READY records.

        Parameters
        ----------
        expect_idle
            Also fail if anything is leased or building: a forgotten release.

        Raises
        ------
        IntegrityError
            Naming the first contradiction.
        """
        with self._lock:
            self._ledger.check(expect_idle=expect_idle)
            entries, stats = self._ledger.entries, self._stats
            self._builds.check(set(entries), expect_idle=expect_idle)
            if stats.hits != stats.hits_whole + stats.hits_partial:
                raise IntegrityError("store: hits do not add up")
            kinds = (
                stats.misses_absent,
                stats.misses_building,
                stats.misses_failed,
                stats.misses_tokens_differ,
            )
            if stats.misses != sum(kinds):
                raise IntegrityError("store: misses do not add up")
            self.matcher.check_integrity({k: e.record.token_ids for k, e in entries.items()})
