"""The in-memory tier: chunk records under a byte budget, with leases, pins and one writer a key."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from chunk_cache.errors import ChunkCacheError, IntegrityError
from chunk_cache.handles import Build, ChunkState, Lease
from chunk_cache.keys import ChunkKey, KVContext, as_prompt_ids, as_token_ids
from chunk_cache.matching import ChunkMatcher
from chunk_cache.records import ChunkKV
from chunk_cache.spans import Match, check_spans, merge_matches
from chunk_cache.stats import StoreStats

_MAX_FAILURES_KEPT = 4096


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
    in_use: int = 0
    hits: int = 0
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
            "in_use": self.in_use,
            "hits": self.hits,
            "idle_s": round(self.idle_s, 3),
            "detail": self.detail,
        }


class _Entry:
    """Book-keeping of one READY record."""

    __slots__ = ("detached", "hits", "pinned", "record", "refs", "used_at")

    def __init__(self, record: ChunkKV, pinned: bool, now: float) -> None:
        self.record = record
        self.pinned = pinned
        self.refs = 0
        self.hits = 0
        self.used_at = now
        # Dropped (damaged) while leased: found by nobody, but its bytes are real until the last
        # lease ends.
        self.detached = False


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
        self._budget = byte_budget
        self._build_timeout_s = build_timeout_s
        self._retry_failed_s = retry_failed_s
        self._clock = clock
        self._lock = threading.RLock()
        self._entries: dict[ChunkKey, _Entry] = {}
        # Keys that may go, least recently used first: refs == 0 and not pinned. Keeping exactly
        # these makes an eviction O(1) however much is pinned.
        self._evictable: OrderedDict[ChunkKey, None] = OrderedDict()
        self._builds: dict[ChunkKey, Build] = {}
        self._failures: OrderedDict[ChunkKey, tuple[float, str]] = OrderedDict()
        self._detached: set[_Entry] = set()
        self._stats = StoreStats(byte_budget=byte_budget)

    # -- looking up ---------------------------------------------------------------------------

    def state(self, key: ChunkKey) -> ChunkState | None:
        """Tell where a key stands, without counting a look-up or touching the LRU order."""
        with self._lock:
            self._expire_builds()
            if key in self._entries:
                return ChunkState.READY
            if key in self._builds:
                return ChunkState.BUILDING
            return ChunkState.FAILED if key in self._failures else None

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
            entry = self._entries.get(key)
            if entry is None:
                self._expire_builds()
                self._stats.misses += 1
                if key in self._builds:
                    self._stats.misses_building += 1
                elif key in self._failures:
                    self._stats.misses_failed += 1
                else:
                    self._stats.misses_absent += 1
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
            entry.refs += 1
            entry.used_at = self._clock()
            self._evictable.pop(key, None)
            return Lease(entry.record, chunk_offset, int(ids.size), lambda: self._release(entry))

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

    def _release(self, entry: _Entry) -> None:
        with self._lock:
            entry.refs -= 1
            if entry.refs < 0:
                raise IntegrityError(f"chunk {entry.record.key} was released more than leased")
            if entry.refs:
                return
            if entry.detached:
                self._detached.discard(entry)
                self._stats.bytes_now -= entry.record.num_bytes
                return
            entry.used_at = self._clock()
            if not entry.pinned:
                self._evictable[entry.record.key] = None

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
            against: ChunkState | None = None
            if key in self._entries:
                against = ChunkState.READY
            elif key in self._builds:
                against = ChunkState.BUILDING
            elif key in self._failures and now < self._failures[key][0]:
                against = ChunkState.FAILED
            if against is not None:
                self._stats.builds_refused += 1
                return against
            self._failures.pop(key, None)
            deadline = now + (self._build_timeout_s if timeout_s is None else timeout_s)
            build = Build(key, ids, owner, deadline, self._commit, self._abort)
            self._builds[key] = build
            self._stats.builds_begun += 1
            return build

    def put(self, record: ChunkKV, *, pin: bool = False) -> bool:
        """Store a finished record in one step (import, tests).

        Returns
        -------
        bool
            ``True`` if it is READY now; ``False`` if it was there, is being built, or has no room.
        """
        build = self.begin_build(record.key, record.token_ids, owner="put")
        return isinstance(build, Build) and build.commit(record, pin=pin)

    def release_owner(self, owner: str) -> int:
        """Drop every build of an owner that is gone (an aborted request); returns how many."""
        with self._lock:
            mine = [build for build in self._builds.values() if build.owner == owner]
            return sum(build.abort("owner gone", failed=False) for build in mine)

    def _commit(self, build: Build, record: ChunkKV, pin: bool) -> bool:
        if record.key != build.key:
            raise ChunkCacheError(f"record {record.key} committed to the build of {build.key}")
        if self.checksums and record.checksum is None:
            record = record.sealed()  # outside the lock: it reads every byte
        with self._lock:
            self._expire_builds()
            if self._builds.get(build.key) is not build:
                return False
            del self._builds[build.key]
            if record.num_bytes > self._budget:
                self._stats.rejected_too_big += 1
                self._fail(
                    build.key,
                    f"{record.num_bytes} bytes are more than the budget of {self._budget}",
                )
                return False
            if not self._make_room(record.num_bytes):
                self._stats.rejected_no_room += 1
                return False
            entry = _Entry(record, pin, self._clock())
            self._entries[build.key] = entry
            if pin:
                self._stats.pinned_bytes_now += record.num_bytes
            else:
                self._evictable[build.key] = None
            self._stats.inserted += 1
            self._stats.bytes_now += record.num_bytes
            self.matcher.add(build.key, record.token_ids)
            return True

    def _abort(self, build: Build, reason: str, failed: bool) -> bool:
        with self._lock:
            if self._builds.get(build.key) is not build:
                return False
            del self._builds[build.key]
            self._stats.builds_aborted += 1
            if failed:
                self._fail(build.key, reason)
            return True

    def _fail(self, key: ChunkKey, reason: str) -> None:
        self._failures[key] = (self._clock() + self._retry_failed_s, reason)
        self._failures.move_to_end(key)
        while len(self._failures) > _MAX_FAILURES_KEPT:
            self._failures.popitem(last=False)

    def _expire_builds(self) -> None:
        if not self._builds:
            return
        now = self._clock()
        for key in [key for key, build in self._builds.items() if build.deadline <= now]:
            owner = self._builds.pop(key).owner
            self._stats.builds_expired += 1
            self._fail(key, f"build of {owner or 'an unnamed owner'} timed out")

    # -- eviction and administration ----------------------------------------------------------

    def _make_room(self, num_bytes: int) -> bool:
        """Evict least recently used records until ``num_bytes`` fit; all or nothing."""
        over = self._stats.bytes_now + num_bytes - self._budget
        victims: list[ChunkKey] = []
        for key in self._evictable:
            if over <= 0:
                break
            victims.append(key)
            over -= self._entries[key].record.num_bytes
        if over > 0:
            return False  # evicting some would lose records and still not help
        for key in victims:
            self._stats.evicted += 1
            self._stats.evicted_bytes += self._entries[key].record.num_bytes
            self._drop(key)
        return True

    def _drop(self, key: ChunkKey) -> None:
        entry = self._entries.pop(key)
        self._evictable.pop(key, None)
        self.matcher.remove(key)
        if entry.pinned:
            self._stats.pinned_bytes_now -= entry.record.num_bytes
        if entry.refs:
            entry.detached = True
            self._detached.add(entry)
        else:
            self._stats.bytes_now -= entry.record.num_bytes

    def pin(self, key: ChunkKey) -> bool:
        """Keep a READY record until :meth:`unpin`; ``False`` if it is not READY."""
        return self._set_pinned(key, True)

    def unpin(self, key: ChunkKey) -> bool:
        """Make a record evictable again; ``False`` if it is not READY."""
        return self._set_pinned(key, False)

    def _set_pinned(self, key: ChunkKey, pinned: bool) -> bool:
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                return False
            if entry.pinned != pinned:
                entry.pinned = pinned
                sign = 1 if pinned else -1
                self._stats.pinned_bytes_now += sign * entry.record.num_bytes
                if pinned:
                    self._evictable.pop(key, None)
                elif not entry.refs:
                    self._evictable[key] = None
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
            entry = self._entries.get(key)
            if entry is None or entry.refs or (entry.pinned and not force):
                return False
            self._stats.evicted_by_hand += 1
            self._drop(key)
            return True

    def clear(self) -> int:
        """Drop everything that is neither in use nor pinned; returns how many went."""
        with self._lock:
            return sum(self.evict(key) for key in list(self._evictable))

    def keys(self) -> list[ChunkKey]:
        """Keys of all READY records."""
        with self._lock:
            return list(self._entries)

    def find_keys(self, prefix: str) -> list[ChunkKey]:
        """READY keys whose digest starts with ``prefix`` (what a person types)."""
        with self._lock:
            return [key for key in self._entries if key.digest.startswith(prefix)]

    def ls(self) -> list[EntryInfo]:
        """List READY, BUILDING and FAILED keys, most recently used first."""
        with self._lock:
            self._expire_builds()
            now = self._clock()
            ready = [
                EntryInfo(
                    key=key,
                    state=ChunkState.READY,
                    num_bytes=entry.record.num_bytes,
                    base_position=entry.record.base_position,
                    pinned=entry.pinned,
                    in_use=entry.refs,
                    hits=entry.hits,
                    idle_s=now - entry.used_at,
                )
                for key, entry in self._entries.items()
            ]
            ready.sort(key=lambda info: (info.idle_s, info.key.digest))
            building = [
                EntryInfo(key=key, state=ChunkState.BUILDING, detail=build.owner)
                for key, build in self._builds.items()
            ]
            failed = [
                EntryInfo(key=key, state=ChunkState.FAILED, detail=reason)
                for key, (_, reason) in self._failures.items()
            ]
            return ready + building + failed

    def stats(self) -> StoreStats:
        """Return a copy of the counters with the gauges filled in."""
        with self._lock:
            return dataclasses.replace(
                self._stats,
                chunks_now=len(self._entries),
                in_use_now=sum(entry.refs > 0 for entry in self._entries.values()),
            )

    def verify(self) -> list[ChunkKey]:
        """Recompute all checksums and drop records that changed.

        Returns
        -------
        list[ChunkKey]
            The damaged ones. Records stored without a checksum cannot be judged and are skipped.
        """
        with self._lock:
            sealed = [e for e in self._entries.values() if e.record.checksum is not None]
        bad: list[ChunkKey] = []
        for entry in sealed:
            if entry.record.verify():
                continue
            with self._lock:
                if self._entries.get(entry.record.key) is entry:
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
            entries, stats = self._entries, self._stats
            self._demand(
                stats.bytes_now
                == sum(e.record.num_bytes for e in entries.values())
                + sum(e.record.num_bytes for e in self._detached),
                "bytes_now is not the sum of the records",
            )
            self._demand(stats.bytes_now <= self._budget, "the byte budget is exceeded")
            self._demand(
                stats.pinned_bytes_now
                == sum(e.record.num_bytes for e in entries.values() if e.pinned),
                "pinned_bytes_now is not the sum of the pinned records",
            )
            self._demand(
                set(self._evictable) == {k for k, e in entries.items() if not (e.refs or e.pinned)},
                "the eviction list is not the records that are neither in use nor pinned",
            )
            for key, entry in entries.items():
                self._demand(entry.refs >= 0, f"{key} has a negative reference count")
                self._demand(not entry.detached, f"{key} is indexed and detached at once")
                self._demand(entry.record.key == key, f"{key} holds the record of another key")
                self._demand(
                    ChunkKey.of(key.namespace, entry.record.token_ids) == key,
                    f"{key} is not the hash of its token ids",
                )
            for entry in self._detached:
                self._demand(entry.detached and entry.refs > 0, "a detached record is not in use")
            ready, building, failed = set(entries), set(self._builds), set(self._failures)
            self._demand(
                not (ready & building or ready & failed or building & failed),
                "a key is in two states at once",
            )
            self._demand(stats.hits == stats.hits_whole + stats.hits_partial, "hits do not add up")
            self._demand(
                stats.misses
                == stats.misses_absent
                + stats.misses_building
                + stats.misses_failed
                + stats.misses_tokens_differ,
                "misses do not add up",
            )
            self.matcher.check_integrity({k: e.record.token_ids for k, e in entries.items()})
            if expect_idle:
                leased = [str(k) for k, e in entries.items() if e.refs]
                self._demand(not leased and not self._detached, f"still leased: {leased}")
                self._demand(not building, f"still building: {[str(k) for k in building]}")

    @staticmethod
    def _demand(holds: bool, message: str) -> None:
        if not holds:
            raise IntegrityError(message)
