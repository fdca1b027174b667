"""How records come into the memory store: the right to build a key, loads from a tier, commits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy.typing as npt

from chunk_cache.errors import ChunkCacheError
from chunk_cache.keys import ChunkKey, as_token_ids
from chunk_cache.records import ChunkKV
from chunk_cache.store.builds import Build, ChunkState
from chunk_cache.store.kept import KeptStore
from chunk_cache.store.loading import LoadingChunk


class WritableStore(KeptStore):
    """Where each key stands, and every way from one state to another."""

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
            leased it keeps it. It stays where the exact one finds no room.

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
            stored = self._room.make(loading.record, build.tenant)
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
                is_in = record.is_lossless and self._room.upgrade(record, build.tenant, pin=pin)
                self._stats.inserted += is_in
                return is_in
            entry = build.loading
            if entry is None and record.num_bytes > self._ledger.byte_budget:
                reason = f"{record.num_bytes} bytes, the budget is {self._ledger.byte_budget}"
                self._builds.fail(build.key, reason, self._clock())
            stored = record if entry is not None else self._room.make(record, build.tenant)
            if stored is None:
                return False
            if entry is None:
                self._room.add(stored, build.tenant, pin=pin)
            else:
                self.matcher.add(build.key, stored.token_ids)
                self._ledger.attach(entry, stored, self._clock())
                self._end_load(build)
                self._ledger.set_pinned(entry, pin, self._clock())
            self._stats.inserted += 1
            return True

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

    def reset(self) -> None:
        """Forget every record, pinned and leased ones too, and take every build's right: nothing old is found again.

        The bytes of a leased record are counted until its last lease ends.
        """
        with self._lock:
            for key in list(self._ledger.entries):
                self._room.drop(key)
            for build in list(self._builds.building.values()):
                build.abort("the store was reset", failed=False)
            self._builds.failed.clear()
