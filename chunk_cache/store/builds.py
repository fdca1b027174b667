"""The right to build a missing key, who holds it, and which builds failed."""

from __future__ import annotations

import enum
from collections import OrderedDict
from collections.abc import Callable
from types import TracebackType
from typing import Self

from chunk_cache.errors import IntegrityError
from chunk_cache.keys import ChunkKey, TokenIds
from chunk_cache.records import ChunkKV
from chunk_cache.store.ledger import Entry

_MAX_FAILURES_KEPT = 4096


class ChunkState(enum.Enum):
    """Where a key stands in a store; a key that is in none of these is simply absent."""

    BUILDING = "building"
    """One writer computes it. Everybody else treats it as a miss and must not compute it too."""
    LOADING = "loading"
    """It is read from a lower tier: leased already, its layers are waited for. Nobody else may compute it either."""
    READY = "ready"
    FAILED = "failed"
    """The last build failed, and the store's back-off has not passed; then the key is absent again."""


class Build:
    """The right to write one key, held by one writer at a time.

    Leaving the ``with`` block without :meth:`commit` aborts. A build older than its timeout loses
    the right: its late ``commit`` returns ``False`` and changes nothing.
    """

    __slots__ = (
        "_abort",
        "_commit",
        "deadline",
        "is_upgrade",
        "key",
        "loading",
        "owner",
        "tenant",
        "token_ids",
    )

    def __init__(
        self,
        key: ChunkKey,
        token_ids: TokenIds,
        owner: str,
        deadline: float,
        commit: Callable[[Build, ChunkKV, bool], bool],
        abort: Callable[[Build, str, bool], bool],
        tenant: str = "",
        *,
        is_upgrade: bool = False,
    ) -> None:
        self.key = key
        self.token_ids = token_ids
        self.owner = owner
        self.tenant = tenant
        self.deadline = deadline
        self.is_upgrade = is_upgrade
        """Whether an approximate record of the key was READY when it began, and stays so until the commit."""
        self.loading: Entry | None = None
        """Room that is taken already, and who leases it (:meth:`MemoryStore.begin_load`); the store's."""
        self._commit = commit
        self._abort = abort

    def commit(self, record: ChunkKV, *, pin: bool = False) -> bool:
        """Publish the finished record.

        Parameters
        ----------
        record : ChunkKV
            Must carry this build's key.
        pin : bool
            Store it pinned.

        Returns
        -------
        bool
            ``True`` if it is now READY. ``False`` if this build no longer holds the right, or the
            budget has no room for it (counted in the statistics).
        """
        return self._commit(self, record, pin)

    def abort(self, reason: str = "", *, failed: bool = True) -> bool:
        """Give the right up.

        Parameters
        ----------
        reason : str
            Kept with the FAILED state for listings.
        failed : bool
            ``False`` for a build that was merely dropped (request aborted, load shed): the key goes
            back to absent, without back-off.

        Returns
        -------
        bool
            ``False`` if the build had ended already.
        """
        return self._abort(self, reason, failed)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._abort(
            self, "" if error is None else f"{type(error).__name__}: {error}", error is not None
        )


class BuildTable:
    """Keys in BUILDING, LOADING and FAILED; no key is in two. No locks: the store's job.

    Parameters
    ----------
    retry_failed_s : float
        Back-off before a FAILED key may be built again, seconds.
    """

    def __init__(self, retry_failed_s: float) -> None:
        self._retry_failed_s = retry_failed_s
        self.building: dict[ChunkKey, Build] = {}
        # Oldest failure first, and the back-off is one for all, so the first to end is in front; bounded,
        # because failing keys come from what clients send.
        self.failed: OrderedDict[ChunkKey, tuple[float, str]] = OrderedDict()

    def state(self, key: ChunkKey) -> ChunkState | None:
        """Return BUILDING, LOADING, FAILED or none; call :meth:`expire` first."""
        build = self.building.get(key)
        if build is not None:
            return ChunkState.BUILDING if build.loading is None else ChunkState.LOADING
        return ChunkState.FAILED if key in self.failed else None

    def begin(self, build: Build) -> None:
        """Register the one writer of a key."""
        self.failed.pop(build.key, None)
        self.building[build.key] = build

    def end(self, build: Build) -> bool:
        """Take the right back; ``False`` if ``build`` does not hold it any more."""
        if self.building.get(build.key) is not build:
            return False
        del self.building[build.key]
        return True

    def fail(self, key: ChunkKey, reason: str, now: float) -> None:
        """Remember a failure."""
        self.failed[key] = (now + self._retry_failed_s, reason)
        self.failed.move_to_end(key)
        while len(self.failed) > _MAX_FAILURES_KEPT:
            self.failed.popitem(last=False)

    def expire(self, now: float) -> list[Build]:
        """Fail builds past their deadline and forget failures past their back-off; returns the builds."""
        late = [build for build in self.building.values() if build.deadline <= now]
        for build in late:
            del self.building[build.key]
            if build.is_upgrade:
                continue  # what it would have replaced serves on
            self.fail(build.key, f"build of {build.owner or 'an unnamed owner'} timed out", now)
        while self.failed and next(iter(self.failed.values()))[0] <= now:
            self.failed.popitem(last=False)
        return late

    def check(self, ready: set[ChunkKey], *, expect_idle: bool) -> None:
        """Check that states exclude each other; see :meth:`MemoryStore.check_integrity`."""
        building, failed = set(self.building), set(self.failed)
        ready = ready - {key for key, build in self.building.items() if build.is_upgrade}
        for one, two in ((ready, building), (ready, failed), (building, failed)):
            if one & two:
                raise IntegrityError(f"store: in two states: {[str(key) for key in one & two]}")
        if any(build.key != key for key, build in self.building.items()):
            raise IntegrityError("store: a build is filed under another key")
        if expect_idle and building:
            raise IntegrityError(f"store: still building {[str(key) for key in building]}")
