"""Chunks and turns of a request that are not in memory: fetched from lower tiers from its arrival on.

Three things are fetched: explicit spans, which name their chunks by content, the turns of the request's conversation
that its prompt goes through, and the memory that it names. Automatic matching finds chunks by the token ids that are in memory, and stays with memory.

The wait for them is bounded. A request whose chunks are on their way is left in the waiting queue, and those behind it
go first. It waits for the headers of its records only (so that it is known what there is), and for as many layers as
``fusion.preload_layers`` says; the other layers load while it is computed.
"""

from __future__ import annotations

import time
from typing import Any

from chunk_cache import (
    PATIENCE_S,
    Candidate,
    ChunkCacheError,
    ChunkKey,
    Fetch,
    Fetcher,
    as_token_ids,
)
from rag_pipeline.sglang_plugin.fusion.builds.variants import variant_at
from rag_pipeline.sglang_plugin.fusion.memory.leasing import wanted as wanted_memories
from rag_pipeline.sglang_plugin.fusion.request.namespace import RadixNamespace
from rag_pipeline.sglang_plugin.fusion.request.state import RequestState
from rag_pipeline.sglang_plugin.fusion.runtime.runtime import FusionRuntime

HEADER_WAIT_S = 0.05
"""Longest that a request waits to hear what there is, seconds; what comes later serves the next one."""
_NAP_S = 0.005
"""How long an engine with nothing else to do waits at once: its loop would take the reading threads' time."""


def expect(runtime: FusionRuntime, req: Any, state: RequestState) -> None:
    """Note what a request that has just come would load, and begin to fetch it; touches nothing that other ranks see.

    Where the eviction policy uses the waiting queue, it says when to fetch (:mod:`.queue_hints`).
    """
    by_queue = runtime.store.uses_queue
    if (runtime.fetcher is None and not by_queue) or not _may_fetch(runtime, state):
        return
    if runtime.epoch and not by_queue:  # no tier holds anything of these weights
        return
    state.expect(_candidates(runtime, req, state))
    if runtime.fetcher is not None and state.request.conversation:
        state.await_lookup(runtime.conversations.look_up(state, _tenant(req)))
    if not by_queue:
        begin(runtime, state)


def begin(runtime: FusionRuntime, state: RequestState) -> tuple[Fetch, ...]:
    """Begin to fetch what a request wants and memory has not; return what is on its way."""
    # After an update of the weights no tier holds anything of them.
    if runtime.fetcher is not None and not runtime.epoch:
        state.await_fetches(runtime.fetcher.begin(state.wanted))
    return state.fetches


def _candidates(
    runtime: FusionRuntime, req: Any, state: RequestState
) -> tuple[tuple[Candidate, ...], ...]:
    request = state.request
    tenant = _tenant(req)
    turns = runtime.conversations.wanted(state, tenant) if request.conversation else ()
    return (
        *wanted_memories(runtime, state, tenant),
        *_chunks(runtime, state, tenant),
        *((turn,) for turn in turns),
    )


def _tenant(req: Any) -> RadixNamespace:
    return RadixNamespace(req.extra_key, req.cache_salt)


def _chunks(
    runtime: FusionRuntime, state: RequestState, tenant: RadixNamespace
) -> list[tuple[Candidate, ...]]:
    request = state.request
    if not request.spans:
        return []
    prefix = runtime.prefix(state.prompt, request.prefix_len, tenant)
    with_passage = runtime.behind_passage(prefix) if request.passage is not False else None
    wanted = []
    for start, end in request.spans:
        best = variant_at(start, prefix, with_passage)
        others = [v for v in (prefix, with_passage) if v is not None and v is not best]
        try:
            ids = as_token_ids(state.prompt[start:end])
        except ChunkCacheError:
            continue  # an empty span, or ids that the engine made: never stored
        wanted.append(
            tuple(
                Candidate(ChunkKey.of(variant.context, ids), ids, variant.context, tenant.owner)
                for variant in (best, *others)
            )
        )
    return wanted


def _begin_late(runtime: FusionRuntime, fetcher: Fetcher, state: RequestState) -> None:
    """Fetch for a request whose turn has come what nobody fetched ahead, or what was evicted again."""
    if not state.has_begun:
        begin(runtime, state)
    elif not state.asked_at and not runtime.epoch:
        # What no tier had a moment ago is not asked for once more.
        absent = {
            fetch.candidates[0].key
            for fetch in state.fetches
            if fetch.is_ended and fetch.loading is None
        }
        gone = [
            row
            for row in state.wanted
            if row[0].key not in absent and not runtime.store.can_lease(row[0].key)
        ]
        if gone:
            state.await_fetches([*state.fetches, *fetcher.begin(gone)])


def _is_busy(adder: Any) -> bool:
    return bool(adder.can_run_list) or not adder.running_batch.is_empty()


def _looks_up(
    runtime: FusionRuntime, fetcher: Fetcher, adder: Any, req: Any, state: RequestState
) -> bool:
    """Whether shared tiers may still tell of turns in time; what they told of is wanted, and on its way."""
    assert state.lookup is not None
    state.note_asked()
    late = time.monotonic() - state.asked_at >= HEADER_WAIT_S
    if not late and not state.lookup.wait(0.0 if _is_busy(adder) else _NAP_S):
        return True
    state.await_lookup(None)
    before = {row[0].key for row in state.wanted}
    state.expect(_candidates(runtime, req, state))
    new = [row for row in state.wanted if row[0].key not in before]
    if new and not runtime.epoch:
        state.await_fetches([*state.fetches, *fetcher.begin(new)])
    return False


def must_wait(runtime: FusionRuntime, adder: Any, req: Any, state: RequestState) -> bool:
    """Whether a request stays in the queue for now; a vote where there are several ranks.

    Bounded: each rank says so for :data:`HEADER_WAIT_S`, and for ``PATIENCE_S`` where layers are to be there first or a
    memory is fetched, from the first time that it is asked.
    """
    if not _may_fetch(runtime, state):
        return False
    if runtime.group.size == 1 and not state.wanted and state.lookup is None:
        return False
    return any(runtime.group.gather(lambda: _waits(runtime, adder, req, state)))


def _waits(runtime: FusionRuntime, adder: Any, req: Any, state: RequestState) -> bool:
    fetcher, layers = runtime.fetcher, runtime.config.preload_layers
    if fetcher is not None:
        _begin_late(runtime, fetcher, state)
        if state.lookup is not None and _looks_up(runtime, fetcher, adder, req, state):
            return True
    if fetcher is None or not state.fetches:
        return False

    memory = state.request.memory
    # What a memory holds no prefill can give: a miss of it costs more than a wait.
    header_s = HEADER_WAIT_S if memory is None or not memory.load else PATIENCE_S

    def is_ready() -> bool:
        waited = time.monotonic() - state.asked_at
        if waited >= header_s and (waited >= PATIENCE_S or not layers):
            return True
        # What has no header by now is a miss, and nothing more is waited for.
        late = waited >= header_s
        return all(f.has_layers(layers) if f.has_header else late for f in state.fetches)

    state.note_asked()
    if is_ready() or (not _is_busy(adder) and fetcher.wait(is_ready, _NAP_S)):
        state.await_fetches(())
        return False
    return True


def _may_fetch(runtime: FusionRuntime, state: RequestState) -> bool:
    """The same on every rank."""
    request = state.request
    return bool(
        (request.spans or request.conversation or request.memory is not None)
        and request.mode not in ("off", "build")
        and runtime.is_on
        and not state.internal
    )
