"""The waiting queue as a hint: what is needed next stays in memory, and is fetched ahead of its turn.

Scheduler-aware fetching and eviction of CachedAttention (https://arxiv.org/abs/2403.19708, section 3.3), for eviction
policies that use the queue; with all others nothing is collected. Every rank does this by itself: ranks have the same
queue, and what only one has in memory is settled by the vote of admission.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from chunk_cache.eviction import WaitingJob
from rag_pipeline.sglang_plugin.fusion.admission.fetching import begin
from rag_pipeline.sglang_plugin.fusion.request.state import RequestState, state_of
from rag_pipeline.sglang_plugin.fusion.runtime.runtime import FusionRuntime


def note_queue(runtime: FusionRuntime, waiting: list[Any]) -> None:
    """Tell the store who waits, where that has changed, and begin to fetch for those in the prefetch window.

    Parameters
    ----------
    runtime : FusionRuntime
        Of this process.
    waiting : list of Req
        The scheduler's queue, the next first. Its order is SGLang's at the last step, so run with
        ``--schedule-policy fcfs``.
    """
    if not runtime.store.uses_queue:
        return
    hinted = [(str(req.rid), state) for req, state in _states(waiting) if state.wanted]
    # By identity too: a name may come again.
    seen = [(name, id(state)) for name, state in hinted]
    if seen == runtime.queue_seen:
        return
    runtime.queue_seen = seen
    worth = set(runtime.store.note_waiting(_job(runtime, *one) for one in hinted))
    if runtime.fetcher is None or not worth:
        return
    for _, state in hinted:
        # A chunk whose best record is here, or on its way, needs no other one.
        if not state.has_begun and any(row[0].key in worth for row in state.wanted):
            runtime.metrics.count_tier("", "fetched_ahead", len(begin(runtime, state)))


def _states(waiting: list[Any]) -> Iterator[tuple[Any, RequestState]]:
    for req in waiting:
        state = state_of(req)
        if state is not None:
            yield req, state


def _job(runtime: FusionRuntime, name: str, state: RequestState) -> WaitingJob:
    """What a request will read: of each chunk one record, whichever of its variants is there."""
    tokens = sum(row[0].key.num_tokens for row in state.wanted)
    form = runtime.record_form
    return WaitingJob(
        name,
        [candidate.key for row in state.wanted for candidate in row],
        0 if form is None else tokens * form.token_bytes,
    )
