"""Reading from a remote store: the header in one step, the layers after it in a thread. One way for all kinds of server."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import threading

import numpy as np

from chunk_cache.errors import ChunkCacheError
from chunk_cache.keys import ChunkKey, TokenIds
from chunk_cache.records import ChunkKV, seen_ids
from chunk_cache.tiers.base import LayerReader, Tier
from chunk_cache.tiers.encoding import RecordHeader
from chunk_cache.tiers.prefetch import FetchGate, FetchLayers, PrefetchedRecord


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class FoundRecord:
    """A record whose header was read.

    Attributes
    ----------
    header : RecordHeader
        Of the record.
    fetch : callable
        Brings its layers, see :data:`~chunk_cache.tiers.prefetch.FetchLayers`.
    """

    header: RecordHeader
    fetch: FetchLayers


class HeaderFirstTier(Tier):
    """A tier whose records are found by their header.

    Parameters
    ----------
    wait_s : float
        Longest that a request waits for an answer, and for all layers of a record together, seconds.
    calls : int
        Calls for layers that run at once, whatever number of records is read.

    Attributes
    ----------
    damaged_records : int
        Records that were not what was written; they are deleted, so that they can be written anew.
    """

    def __init__(self, *, wait_s: float, calls: int) -> None:
        self.wait_s = wait_s
        self.damaged_records = 0
        self._gate = FetchGate(calls)
        self._counting = threading.Lock()

    @abc.abstractmethod
    def find(self, key: ChunkKey) -> FoundRecord | None:
        """Read the header of a record; ``None`` where it is absent, damaged, or cannot be decoded here.

        Raises
        ------
        OSError
            If the place does not answer.
        """

    def discard(self, key: ChunkKey) -> None:
        """Count a damaged record and drop it: as long as it is there, nobody would write it anew. Never raises."""
        with self._counting:
            self.damaged_records += 1
        self._drop(key)

    def _drop(self, key: ChunkKey) -> None:
        """Remove what is left of a record, such as its header without its layers. Never raises."""
        with contextlib.suppress(OSError):  # it is found so again
            self.remove(key)

    def open(self, key: ChunkKey, token_ids: TokenIds) -> LayerReader | None:
        """Read the header, compare the token ids, and let the layers follow in a thread."""
        found = self.find(key)
        if found is None or not np.array_equal(found.header.token_ids, token_ids):
            return None
        return self._reader(found, self.wait_s)

    def read(self, key: ChunkKey) -> ChunkKV | None:
        """Read a whole record whatever its tokens are; ``None`` where it is damaged or gone."""
        found = self.find(key)
        if found is None:
            return None
        try:
            return self._reader(found, 10 * self.wait_s).record()
        except ChunkCacheError:  # counted where it was found
            return None

    def token_ids(self, key: ChunkKey) -> TokenIds | None:
        """Token ids of a record, from its header."""
        found = self.find(key)
        return None if found is None else found.header.token_ids

    def seen_ids(self, key: ChunkKey) -> TokenIds | None:
        """Token ids that a record's KV was computed from, from its header."""
        found = self.find(key)
        return None if found is None else seen_ids(found.header.side, found.header.token_ids)

    def size_of(self, key: ChunkKey) -> int:
        """Bytes of a record, from its header."""
        found = self.find(key)
        return 0 if found is None else found.header.num_bytes

    def _reader(self, found: FoundRecord, wait_s: float) -> PrefetchedRecord:
        return PrefetchedRecord(
            found.header,
            found.fetch,
            wait_s=wait_s,
            gate=self._gate,
            damaged=lambda: self.discard(found.header.key),
            gone=lambda: self._drop(found.header.key),
        )
