"""The seam for tiers below memory: what one has to offer. :class:`StoreFolder` is the first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

from chunk_cache.keys import ChunkKey, TokenIds
from chunk_cache.records import ChunkKV


@runtime_checkable
class Tier(Protocol):
    """A place below the memory tier that can hold records by key.

    Contract: ``get`` returns a record whose token ids equal ``token_ids``, or ``None``; damage is a
    miss, never an exception and never wrong bytes. ``put`` makes the record visible whole or not at
    all. Both may be called from several threads.
    """

    def get(self, key: ChunkKey, token_ids: TokenIds) -> ChunkKV | None:
        """Read a record, or ``None`` when it is absent, damaged, or of other token ids."""
        ...

    def put(self, record: ChunkKV) -> bool:
        """Write a record; ``False`` if the tier declined it (full, too big)."""
        ...

    def remove(self, key: ChunkKey) -> bool:
        """Drop a record; ``False`` if it was not there."""
        ...

    def keys(self) -> Iterator[ChunkKey]:
        """Iterate over the keys held when the call was made."""
        ...
