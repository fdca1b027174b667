"""Chunks that prompts had and the store had not: a bounded queue that the tenants share evenly."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

from chunk_cache import ChunkKey

if TYPE_CHECKING:
    from rag_pipeline.sglang_plugin.fusion.runtime.runtime import KnownPrefix, TokenArray


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class MissingChunk:
    """A chunk that a prompt had and the store had not."""

    prefix: KnownPrefix
    ids: TokenArray
    key: ChunkKey


class BuildQueue:
    """Missing chunks, oldest first within a tenant, the tenants in turn.

    A full queue takes a chunk only from a tenant that holds two places fewer than the one that holds most,
    and that one loses its newest. So one tenant alone has the whole queue, and no number of its requests keeps
    another out. What is in it depends on nothing but the calls, which tensor-parallel ranks make alike.
    """

    def __init__(self) -> None:
        self._waiting: OrderedDict[str, deque[MissingChunk]] = OrderedDict()

    def __len__(self) -> int:
        """Count the chunks that wait."""
        return sum(len(chunks) for chunks in self._waiting.values())

    def __iter__(self) -> Iterator[MissingChunk]:
        """Iterate over the chunks in the order in which :meth:`take` gives them."""
        rows = [list(chunks) for chunks in self._waiting.values()]
        for place in range(max(map(len, rows), default=0)):
            yield from (row[place] for row in rows if place < len(row))

    def __contains__(self, key: ChunkKey) -> bool:
        return any(chunk.key == key for chunks in self._waiting.values() for chunk in chunks)

    def add(self, chunk: MissingChunk, capacity: int) -> int:
        """Add a chunk that is not in it; return how many were dropped for want of room, this one or another."""
        mine = self._waiting.get(chunk.prefix.tenant.owner, ())
        dropped = 0
        if len(self) >= capacity:
            most = max(self._waiting.values(), key=len, default=deque())
            if len(mine) + 1 >= len(most):
                return 1
            most.pop()
            dropped = 1
        self._waiting.setdefault(chunk.prefix.tenant.owner, deque()).append(chunk)
        return dropped

    def take(self) -> MissingChunk:
        """Take the next chunk out."""
        tenant, chunks = self._waiting.popitem(last=False)
        chunk = chunks.popleft()
        if chunks:
            self._waiting[tenant] = chunks
        return chunk

    def clear(self) -> None:
        """Forget all."""
        self._waiting.clear()
