"""The half of the memory store that changes what is in it: builds, commits, pins, evictions."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy.typing as npt

from chunk_cache.errors import ChunkCacheError
from chunk_cache.eviction import EvictionPolicy, WaitingJob
from chunk_cache.eviction.lru import LRUPolicy
from chunk_cache.keys import ChunkKey, as_token_ids
from chunk_cache.matching import ChunkMatcher
from chunk_cache.records import ChunkKV
from chunk_cache.store.builds import Build, BuildTable, ChunkState
from chunk_cache.store.ledger import Ledger
from chunk_cache.store.loading import LoadingChunk
from chunk_cache.store.slab import Slab
from chunk_cache.store.stats import StoreStats


class WritableStore:
    """Where each key stands, and every way from one state to another.

    The ledger, the builds, the matcher and the counters change together, under the one lock.
    :class:`MemoryStore` adds the looking up; the parameters are told there.
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
        slab: bool = False,
        eviction: EvictionPolicy | None = None,
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
        self._ledger = Ledger(byte_budget, eviction or LRUPolicy(memory_bytes=byte_budget))
        self._slab = Slab(byte_budget) if slab else None
        self._builds = BuildTable(retry_failed_s)
        self._stats = StoreStats()

    def state(self, key: ChunkKey) -> ChunkState | None:
        """Tell where a key stands, without counting a look-up or touching the LRU order."""
        with self._lock:
            if key in self._ledger.entries:
                return ChunkState.READY
            self._expire_builds()
            return self._builds.state(key)

    def tenant_of(self, key: ChunkKey) -> str:
        """To whom a READY record belongs, as its builder said; empty for nobody in particular."""
        with self._lock:
            entry = self._ledger.entries.get(key)
            return "" if entry is None else entry.tenant

    # -- writing ------------------------------------------------------------------------------

    def begin_build(
        self,
        key: ChunkKey,
        token_ids: Iterable[int] | npt.NDArray[Any],
        *,
        owner: str = "",
        tenant: str = "",
        timeout_s: float | None = None,
        exact: bool = False,
    ) -> Build | ChunkState:
        """Ask for the right to build a key.

        Parameters
        ----------
        key, token_ids : ChunkKey, iterable of int or ndarray
            What will be built.
        owner : str
            Who builds it, for listings.
        tenant : str
            Whose share of the budget the record takes: a name, such as :func:`~.tenant_mark` of a salt.
        timeout_s : float, optional
            As ``build_timeout_s`` of the store, for this build.
        exact : bool
            The record will be lossless. Then the right is given too where one is READY that came back from a tier
            approximate. That one is found and leased until the commit puts the exact one in its place; whoever has
            leased it keeps it. It stays where the exact one has no room beside it; where it is not
            leased it goes first, and is lost if the exact one still finds no room.

        Returns
        -------
        Build or ChunkState
            The right, or the state that stands against it: BUILDING or LOADING (somebody else is at it),
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
            entry = self._ledger.entries.get(key)
            is_upgrade = exact and entry is not None and not entry.record.is_lossless
            is_ready = entry is not None and not is_upgrade
            against = ChunkState.READY if is_ready else self._builds.state(key)
            if against is not None:
                self._stats.builds_refused += 1
                return against
            deadline = now + (self._build_timeout_s if timeout_s is None else timeout_s)
            build = Build(
                key, ids, owner, deadline, self._commit, self._abort, tenant, is_upgrade=is_upgrade
            )
            self._builds.begin(build)
            self._stats.builds_begun += 1
            return build

    def begin_load(self, build: Build, loading: LoadingChunk) -> bool:
        """Take room for a record that arrives layer by layer; from now on it is leased as if it were READY.

        It is charged in full at once, and evicted by nobody. ``build.commit(loading.record)`` makes it READY without
        asking for room again; after ``abort`` its bytes are free when the last lease has ended.

        Parameters
        ----------
        build : Build
            The right to its key.
        loading : LoadingChunk
            With that key.

        Returns
        -------
        bool
            ``False`` if the right is lost, or there is no room (counted).
        """
        if loading.key != build.key:
            raise ChunkCacheError(f"chunk {loading.key} loaded for the build of {build.key}")
        with self._lock:
            self._expire_builds()
            if self._builds.building.get(build.key) is not build or build.loading is not None:
                return False
            if build.key in self._ledger.entries:
                return False  # what is READY is not loaded over
            stored = self._make_room(build, loading.record)
            if stored is None:
                return False
            loading.record = stored  # nobody has leased it yet
            build.loading = self._ledger.reserve(loading, self._clock(), build.tenant)
            return True

    def put(self, record: ChunkKV, *, pin: bool = False, tenant: str = "") -> bool:
        """Store a finished record in one step (read from a folder, tests).

        Parameters
        ----------
        record : ChunkKV
            Complete.
        pin : bool
            Whether it is never evicted.
        tenant : str
            As of :meth:`begin_build`.

        Returns
        -------
        bool
            ``True`` if it is READY now; ``False`` if it was there, is being built, or has no room.
        """
        with self._lock:
            self._builds.failed.pop(record.key, None)  # here it is: no reason to wait any longer
        build = self.begin_build(
            record.key, record.token_ids, owner="put", tenant=tenant, exact=record.is_lossless
        )
        return isinstance(build, Build) and build.commit(record, pin=pin)

    def _commit(self, build: Build, record: ChunkKV, pin: bool) -> bool:
        if record.key != build.key:
            raise ChunkCacheError(f"record {record.key} committed to the build of {build.key}")
        if self.checksums and record.checksum is None:
            record = record.sealed()  # outside the lock: it reads every byte
        with self._lock:
            self._expire_builds()
            if not self._builds.end(build):
                return False
            if build.key in self._ledger.entries:
                return record.is_lossless and self._upgrade(build, record, pin)
            entry = build.loading
            if entry is None and record.num_bytes > self._ledger.byte_budget:
                reason = f"{record.num_bytes} bytes, the budget is {self._ledger.byte_budget}"
                self._builds.fail(build.key, reason, self._clock())
            stored = record if entry is not None else self._make_room(build, record)
            if stored is None:
                return False
            record = stored
            self.matcher.add(build.key, record.token_ids)
            if entry is None:
                self._ledger.insert(record, pin, self._clock(), build.tenant)
            else:
                self._ledger.attach(entry, record, self._clock())
                self._end_load(build)
                self._ledger.set_pinned(entry, pin, self._clock())
            self._stats.inserted += 1
            return True

    def _upgrade(self, build: Build, record: ChunkKV, pin: bool) -> bool:
        """Put an exact record in the place of an approximate one, whose users keep it; its pin goes over."""
        key, until = build.key, self._ledger.pin_ends.get(build.key)
        old = self._ledger.entries[key]
        is_pinned, hits = old.pinned, old.hits
        if not old.refs and record.num_bytes <= old.record.num_bytes:
            del old  # a slab has the room when nobody holds a tensor in it
            self._drop(key)
            stored = self._make_room(build, record)
        else:
            self._ledger.take(old)  # nobody's victim meanwhile
            stored = self._make_room(build, record)
            self._ledger.give_back(old, self._clock())
            if stored is not None:
                self._drop(key)
        if stored is None:
            return False
        self.matcher.add(key, stored.token_ids)
        self._ledger.insert(stored, pin or is_pinned, self._clock(), build.tenant)
        entry = self._ledger.entries[key]
        entry.hits = hits
        if is_pinned and not pin and until is not None:
            self._ledger.pin_ends[key] = until
        self._stats.inserted += 1
        self._stats.upgraded += 1
        return True

    def _victims(self, record: ChunkKV, tenant: str) -> list[ChunkKey] | None:
        """Keys to drop so that a record fits; with a slab, as few more as leave it room in one piece."""
        ledger, slab, now = self._ledger, self._slab, self._clock()
        self._end_pins()
        victims = ledger.victims(record.num_bytes, tenant, now)
        if slab is None or victims is None or self._fits(slab, record, victims):
            return victims
        # Who asks for more gets the same victims and then others, so the fewest are found by bisection.
        low, high, victims = record.num_bytes, ledger.byte_budget + 1, None
        while high - low > 1:
            middle = (low + high) // 2
            found = ledger.victims(middle, tenant, now)
            if found is None or self._fits(slab, record, found):
                high, victims = middle, found
            else:
                low = middle
        return victims

    def _fits(self, slab: Slab, record: ChunkKV, victims: Iterable[ChunkKey]) -> bool:
        stored = [self._ledger.entries[key].record for key in victims]
        return slab.fits(record, [one for one in stored if isinstance(one, ChunkKV)])

    def _placed(self, record: ChunkKV) -> ChunkKV | None:
        """Return the record as it will be kept; ``None`` where a tensor that outlived its record is in the way."""
        return record if self._slab is None else self._slab.adopt(record)

    def _make_room(self, build: Build, record: ChunkKV) -> ChunkKV | None:
        """Evict what must go; return the record as it will be kept, ``None``, counted, where it has no room."""
        if record.num_bytes > self._ledger.byte_budget:
            self._stats.rejected_too_big += 1
            return None
        victims = self._victims(record, build.tenant)
        for key in victims or ():
            self._stats.evicted += 1
            self._stats.evicted_bytes += self._drop(key).num_bytes
        stored = None if victims is None else self._placed(record)
        self._stats.rejected_no_room += stored is None
        return stored

    def _end_load(self, build: Build) -> None:
        """Give back the hold that a build has on what it loads."""
        entry, build.loading = build.loading, None
        if entry is not None:
            self._ledger.give_back(entry, self._clock())

    def _abort(self, build: Build, reason: str, failed: bool) -> bool:
        with self._lock:
            if not self._builds.end(build):
                return False
            self._end_load(build)
            self._stats.builds_aborted += 1
            if failed and not build.is_upgrade:
                self._builds.fail(build.key, reason, self._clock())
            return True

    def _expire_builds(self) -> None:
        if self._builds.building or self._builds.failed:
            for build in self._builds.expire(self._clock()):
                self._end_load(build)
                self._stats.builds_expired += 1

    def _end_pins(self) -> None:
        if self._ledger.pin_ends:
            self._stats.pins_expired += self._ledger.end_pins(self._clock())

    def _drop(self, key: ChunkKey) -> ChunkKV | LoadingChunk:
        self.matcher.remove(key)
        return self._ledger.drop(key)

    # -- pins and eviction --------------------------------------------------------------------

    @property
    def uses_queue(self) -> bool:
        """Whether the eviction policy wants :meth:`note_waiting`; if not, its caller saves the collecting."""
        return self._ledger.policy.uses_queue

    def note_waiting(self, jobs: Iterable[WaitingJob]) -> list[ChunkKey]:
        """Tell the eviction policy which requests wait, as a hint.

        The scheduler's hook calls it once per scheduling step in which the queue has changed: after the queue was
        ordered, before the step's requests are admitted. A job is named by its request and lists the chunk keys that
        it may load, READY or not, those of both variants too. Outdated or wrong hints cost hits only.

        Any thread may call. The store's lock is held meanwhile, for O(jobs in the window) and O(log n) per key of the
        jobs that came or went, and O(1) per key in the prefetch window. A policy that does not use the queue returns at
        once and looks at no job.

        Parameters
        ----------
        jobs : iterable of WaitingJob
            The whole queue, the next first.

        Returns
        -------
        list[ChunkKey]
            What the first jobs (the prefetch window) will read and is neither READY nor BUILDING here, the next first:
            worth fetching from a lower tier.
        """
        policy = self._ledger.policy
        if not policy.uses_queue:
            return []
        with self._lock:
            policy.note_queue(jobs)
            ready, building = self._ledger.entries, self._builds.building
            return [
                key
                for key in dict.fromkeys(k for job in policy.jobs_to_prefetch() for k in job.keys)
                if key not in ready and key not in building
            ]

    def awaited_keys(self) -> list[ChunkKey]:
        """Keys that waiting requests will read, READY or not, the next first: as of the last :meth:`note_waiting`."""
        with self._lock:
            return list(dict.fromkeys(self._ledger.policy.awaited()))

    def pin(self, key: ChunkKey, *, ttl_s: float | None = None) -> bool:
        """Keep a READY record until :meth:`unpin`, or for so many seconds; ``False`` if it is not READY.

        A pin that has ended holds nothing: it is taken away when room is needed or somebody looks.
        """
        return self._set_pinned(key, True, ttl_s)

    def unpin(self, key: ChunkKey) -> bool:
        """Make a record evictable again, as if just used; ``False`` if it is not READY."""
        return self._set_pinned(key, False)

    def _set_pinned(self, key: ChunkKey, pinned: bool, ttl_s: float | None = None) -> bool:
        with self._lock:
            entry = self._ledger.entries.get(key)
            if entry is None:
                return False
            now = self._clock()
            self._ledger.set_pinned(entry, pinned, now, None if ttl_s is None else now + ttl_s)
            return True

    def evict(self, key: ChunkKey, *, force: bool = False) -> bool:
        """Drop one record by hand.

        Parameters
        ----------
        key : ChunkKey
            Which.
        force : bool
            Also drop a pinned one. A record in use is never dropped.

        Returns
        -------
        bool
            ``False`` if it is absent, in use, or pinned without ``force``.
        """
        with self._lock:
            self._end_pins()
            entry = self._ledger.entries.get(key)
            if entry is None or entry.refs or (entry.pinned and not force):
                return False
            self._stats.evicted_by_hand += 1
            self._drop(key)
            return True

    def erase(self, keys: Iterable[ChunkKey]) -> int:
        """Drop records whatever holds them; returns how many.

        A pinned one goes too. One that is in use is found by nobody from now on, and its memory is
        free when the last lease ends.
        """
        with self._lock:
            present = [key for key in keys if key in self._ledger.entries]
            for key in present:
                self._stats.evicted_by_hand += 1
                self._drop(key)
            return len(present)

    def clear(self) -> int:
        """Drop everything that is neither in use nor pinned; returns how many went."""
        with self._lock:
            self._end_pins()
            return sum(self.evict(key) for key in list(self._ledger.evictable()))

    def reset(self) -> None:
        """Forget every record, pinned and leased ones too, and take every build's right: nothing old is found again.

        The bytes of a leased record are counted until its last lease ends.
        """
        with self._lock:
            for key in list(self._ledger.entries):
                self._drop(key)
            for build in list(self._builds.building.values()):
                build.abort("the store was reset", failed=False)
            self._builds.failed.clear()
