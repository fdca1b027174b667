"""What a store hands out: a lease on a record in use, and the right to build a missing one."""

from __future__ import annotations

import enum
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

from chunk_cache.keys import ChunkKey, TokenIds
from chunk_cache.records import ChunkKV


class ChunkState(enum.Enum):
    """Where a key stands in a store; a key that is in none of these is simply absent."""

    BUILDING = "building"
    """One writer computes it. Everybody else treats it as a miss and must not compute it too."""
    READY = "ready"
    FAILED = "failed"
    """The last build failed, and the store's back-off has not passed; then the key is absent again."""


class Lease:
    """A record that cannot be evicted until the lease is released. Use as a context manager.

    Attributes
    ----------
    record
        The shared record, read-only.
    chunk_offset, num_tokens
        The run of it that was confirmed on token ids.
    """

    __slots__ = ("_lock", "_release", "chunk_offset", "num_tokens", "record")

    def __init__(
        self, record: ChunkKV, chunk_offset: int, num_tokens: int, release: Callable[[], None]
    ) -> None:
        self.record = record
        self.chunk_offset = chunk_offset
        self.num_tokens = num_tokens
        self._release: Callable[[], None] | None = release
        self._lock = threading.Lock()

    @property
    def released(self) -> bool:
        """Whether :meth:`release` was called."""
        return self._release is None

    def release(self) -> None:
        """Give the record back. Calling it again does nothing."""
        with self._lock:
            release, self._release = self._release, None
        if release is not None:
            release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


class Build:
    """The right to write one key, held by one writer at a time.

    Leaving the ``with`` block without :meth:`commit` aborts. A build older than its timeout loses
    the right: its late ``commit`` returns ``False`` and changes nothing.
    """

    __slots__ = ("_abort", "_commit", "deadline", "key", "owner", "tenant", "token_ids")

    def __init__(
        self,
        key: ChunkKey,
        token_ids: TokenIds,
        owner: str,
        deadline: float,
        commit: Callable[[Build, ChunkKV, bool], bool],
        abort: Callable[[Build, str, bool], bool],
        tenant: str = "",
    ) -> None:
        self.key = key
        self.token_ids = token_ids
        self.owner = owner
        self.tenant = tenant
        self.deadline = deadline
        self._commit = commit
        self._abort = abort

    def commit(self, record: ChunkKV, *, pin: bool = False) -> bool:
        """Publish the finished record.

        Parameters
        ----------
        record
            Must carry this build's key.
        pin
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
        reason
            Kept with the FAILED state for listings.
        failed
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
