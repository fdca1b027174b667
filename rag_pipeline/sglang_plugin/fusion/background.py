"""Missing chunks, computed later: a bounded queue that is served only while the engine has nothing to do."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable
from typing import Any

from chunk_cache import ChunkKey, ChunkState
from rag_pipeline.sglang_plugin.fusion import internal_requests
from rag_pipeline.sglang_plugin.fusion.request_spans import FusionRequest
from rag_pipeline.sglang_plugin.fusion.runtime import (
    FusionRuntime,
    KnownPrefix,
    TokenArray,
    get_runtime,
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MissingChunk:
    """A chunk that a prompt had and the store had not."""

    prefix: KnownPrefix
    ids: TokenArray
    key: ChunkKey


_QUEUE: deque[MissingChunk] = deque()
_IDLE_TURNS = 200
"""Turns of the idle scheduler loop before a build starts, some tens of milliseconds: the gap between two
requests of one client is no idleness. Counted, not timed, so that tensor-parallel ranks agree."""
_idle = 0


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


def around_idle_sleep(original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """Wrap ``IdleSleeper.maybe_sleep``: one sleep is up to a second, far more than an idle turn."""
    if not _QUEUE:
        original(*args, **kwargs)


def before_idle(scheduler: Any, *args: Any, **kwargs: Any) -> None:
    """Run before ``Scheduler.on_idle``: start one build when nothing else is there to do.

    A request that arrives meanwhile waits for at most the prefill of one chunk.
    """
    global _idle
    if not _QUEUE:
        _idle = 0
        return
    runtime = get_runtime()
    if runtime is None or not runtime.is_on or not scheduler.is_fully_idle():
        _idle = 0
        return
    _idle += 1
    if _idle < _IDLE_TURNS:
        return
    _idle = 0
    chunk = take(runtime)
    if chunk is None:
        return
    prefix = chunk.prefix
    start, end = int(prefix.ids.size), int(prefix.ids.size + chunk.ids.size)
    request = FusionRequest(mode="build", spans=((start, end),), prefix_len=start)
    req = internal_requests.submit(
        scheduler,
        [*prefix.ids.tolist(), *chunk.ids.tolist()],
        request,
        extra_key=prefix.tenant.extra_key,
        cache_salt=prefix.tenant.cache_salt,
    )
    runtime.metrics.count("background", "declined" if req is None else "started")
