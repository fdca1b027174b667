"""The hold that a user of a record has on it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

from chunk_cache.records import ChunkKV
from chunk_cache.store.loading import LoadingChunk


class Lease:
    """A record that cannot be evicted until the lease is released. Use as a context manager.

    Attributes
    ----------
    record : ChunkKV or LoadingChunk
        The shared record, read-only; of one that was leased while it loaded, each layer is waited for.
    chunk_offset, num_tokens : int
        The run of it that was confirmed on token ids.
    """

    __slots__ = ("_lock", "_release", "chunk_offset", "num_tokens", "record")

    def __init__(
        self,
        record: ChunkKV | LoadingChunk,
        chunk_offset: int,
        num_tokens: int,
        release: Callable[[], None],
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
