"""Missing chunks, computed later: a bounded queue that is served only while the engine has nothing to do."""

from __future__ import annotations

import dataclasses
from collections import deque

from chunk_cache import ChunkKey, ChunkState
from rag_pipeline.sglang_plugin.fusion.runtime import FusionRuntime, KnownPrefix, TokenArray


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MissingChunk:
    """A chunk that a prompt had and the store had not."""

    prefix: KnownPrefix
    ids: TokenArray
    key: ChunkKey


_QUEUE: deque[MissingChunk] = deque()


def enqueue(runtime: FusionRuntime, prefix: KnownPrefix, ids: TokenArray) -> bool:
    """Remember a missing chunk; False if it is known, being built, or dropped because the queue is full."""
    if not runtime.config.background:
        return False
    key = ChunkKey.of(prefix.context, ids)
    if runtime.store.state(key) in (ChunkState.READY, ChunkState.BUILDING):
        return False
    if any(chunk.key == key for chunk in _QUEUE):
        return False
    if len(_QUEUE) >= runtime.config.max_background:
        runtime.metrics.count("background", "dropped")
        return False
    _QUEUE.append(MissingChunk(prefix=prefix, ids=ids.copy(), key=key))
    runtime.metrics.count("background", "queued")
    return True


def take(runtime: FusionRuntime) -> MissingChunk | None:
    """Next chunk that is still missing, oldest first."""
    while _QUEUE:
        chunk = _QUEUE.popleft()
        if runtime.store.state(chunk.key) is None:
            return chunk
        runtime.metrics.count("background", "obsolete")
    return None


def pending() -> int:
    """Chunks waiting."""
    return len(_QUEUE)


def clear() -> None:
    """Forget all."""
    _QUEUE.clear()
