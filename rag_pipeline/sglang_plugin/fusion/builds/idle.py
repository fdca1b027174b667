"""Missing chunks, computed later: the queue of them, and how an engine that has nothing to do serves it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from chunk_cache import ChunkKey, ChunkState
from rag_pipeline.protocol import build_requests
from rag_pipeline.sglang_plugin.fusion.request import internal as internal_requests
from rag_pipeline.sglang_plugin.fusion.runtime.build_queue import MissingChunk
from rag_pipeline.sglang_plugin.fusion.runtime.runtime import (
    FusionRuntime,
    KnownPrefix,
    TokenArray,
    get_runtime,
)

_IDLE_TURNS = 200
"""Turns of the idle scheduler loop before a build starts, some tens of milliseconds: the gap between two
requests of one client is no idleness. Counted, not timed, so that tensor-parallel ranks agree."""
_idle = 0


def enqueue(runtime: FusionRuntime, prefix: KnownPrefix, ids: TokenArray) -> None:
    """Remember a missing chunk. Looks at nothing that tensor-parallel ranks may see differently."""
    key = ChunkKey.of(prefix.context, ids)
    if not runtime.config.background or key in runtime.missing:
        return
    chunk = MissingChunk(prefix=prefix, ids=ids.copy(), key=key)
    dropped = runtime.missing.add(chunk, runtime.config.max_background)
    runtime.metrics.count("background", "dropped", dropped)
    runtime.metrics.count("background", "queued", key in runtime.missing)


def take(runtime: FusionRuntime) -> MissingChunk | None:
    """Next chunk that is still missing on some tensor-parallel rank and that none may not build; a vote."""
    waiting = list(runtime.missing)
    if not waiting:
        return None
    states = runtime.group.gather(lambda: [runtime.store.state(chunk.key) for chunk in waiting])
    for seen in zip(*states, strict=True):
        chunk = runtime.missing.take()
        if None in seen and set(seen) <= {None, ChunkState.READY}:
            return chunk
        runtime.metrics.count("background", "obsolete")
    return None


def around_idle_sleep(original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """Wrap ``IdleSleeper.maybe_sleep``: one sleep is up to a second, far more than an idle turn."""
    runtime = get_runtime()
    is_fetching = runtime is not None and runtime.fetcher is not None and runtime.fetcher.pending
    if runtime is None or not (runtime.missing or is_fetching):
        original(*args, **kwargs)


def before_idle(scheduler: Any, *args: Any, **kwargs: Any) -> None:
    """Run before ``Scheduler.on_idle``: start one build when nothing else is there to do.

    A request that arrives meanwhile waits for at most the prefill of one chunk.
    """
    global _idle
    runtime = get_runtime()
    if runtime is None or not runtime.missing or not runtime.is_on or not scheduler.is_fully_idle():
        _idle = 0
        return
    _idle += 1
    if _idle < _IDLE_TURNS:
        return
    _idle = 0
    start_next(runtime, scheduler)


def start_next(runtime: FusionRuntime, scheduler: Any) -> None:
    """Start the next build that is worth it; all ranks call it in the same turn of the loop."""
    try:
        chunk = take(runtime)
    except Exception as error:
        # A vote that fails, fails on every rank: they stay in step.
        runtime.missing.clear()
        runtime.say_fault("background", error)
        return
    if chunk is not None:
        start(runtime, scheduler, chunk)


def start(runtime: FusionRuntime, scheduler: Any, chunk: MissingChunk) -> None:
    """Queue the request that computes a chunk and stores it."""
    prefix = chunk.prefix
    # The passage, where the chunk is computed behind it, is a part of this prefix: that is the plain variant.
    request, _ = build_requests(int(prefix.ids.size), int(chunk.ids.size))
    req = internal_requests.submit(
        scheduler,
        [*prefix.ids.tolist(), *chunk.ids.tolist()],
        request,
        extra_key=prefix.tenant.extra_key,
        cache_salt=prefix.tenant.cache_salt,
    )
    runtime.metrics.count("background", "declined" if req is None else "started")
