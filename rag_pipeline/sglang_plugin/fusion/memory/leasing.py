"""At admission: find and lease the memory that a prompt loads, and name what it is to leave."""

from __future__ import annotations

from typing import Any, cast

from chunk_cache import (
    Candidate,
    ChunkCacheError,
    ChunkKey,
    ChunkKV,
    Lease,
    LoadingChunk,
    Match,
    as_token_ids,
)
from chunk_cache.retention import create_rule, own_free
from rag_pipeline.protocol import MemoryFields, memory_id
from rag_pipeline.sglang_plugin.fusion.memory.merged import MergedMemory
from rag_pipeline.sglang_plugin.fusion.memory.records import context_of, is_memory
from rag_pipeline.sglang_plugin.fusion.request.holdings import LeasedSpan
from rag_pipeline.sglang_plugin.fusion.request.memory_work import MemoryTarget, MemoryWork
from rag_pipeline.sglang_plugin.fusion.request.namespace import RadixNamespace
from rag_pipeline.sglang_plugin.fusion.request.state import RequestState
from rag_pipeline.sglang_plugin.fusion.runtime.layer_rules import rules_of
from rag_pipeline.sglang_plugin.fusion.runtime.runtime import FusionRuntime

_LAYOUTS = ("heads", "latent")
"""Layouts whose records hold what lies in the pool, slot by slot."""


def matched_until(state: RequestState) -> int | None:
    """Tokens that a prompt may take from the radix tree; None for any number.

    The tree may hold the prompt's very tokens as a sliding window, where a record stands for a whole history; and rows
    whose queries score have to be computed.
    """
    memory = state.request.memory
    if memory is None:
        return None
    if memory.load:
        return memory.load[0].start
    return first_query(state, memory)


def first_query(state: RequestState, memory: MemoryFields) -> int:
    """First prompt position whose query scores; the end of the prompt where none does."""
    store, prompt_len = memory.store, int(state.prompt.size)
    if store is None:
        return prompt_len
    rule = create_rule(store.rule)
    if rule.probe == "none":
        return prompt_len
    begin = max(_block_start(state, memory), store.end - rule.window_rows)
    return begin if rule.probe == "window" else store.end


def _block_start(state: RequestState, memory: MemoryFields) -> int:
    """Where the tokens of a step's own begin: behind what is loaded, else behind the prefix."""
    return memory.load_end or state.request.prefix_len


def wanted(
    runtime: FusionRuntime, state: RequestState, tenant: RadixNamespace
) -> list[tuple[Candidate, ...]]:
    """Records that :func:`lease` would use, in memory or not."""
    memory = state.request.memory
    if memory is None or runtime.facts is None:
        return []
    found: list[tuple[Candidate, ...]] = []
    for load in memory.load:
        prefix = state.prompt[: load.start]
        context = context_of(runtime.facts, load.id, prefix, tenant)
        try:
            ids = as_token_ids(state.prompt[load.start : load.end])
        except ChunkCacheError:
            continue  # ids that the engine made: never stored
        found.append((Candidate(ChunkKey.of(context, ids), ids, context, tenant.owner),))
    return found


def lease(runtime: FusionRuntime, state: RequestState, tenant: RadixNamespace) -> None:
    """Lease what the prompt loads, where every rank has it, and begin the work of the request.

    Like the turns of a conversation, slots are no policy's to recompute, and the tree gets nothing behind the first.

    Parameters
    ----------
    runtime : FusionRuntime
        Of this process.
    state : RequestState
        Its request has a memory; changed by its methods.
    tenant : RadixNamespace
        Whose request it is; nothing of another namespace is leased.
    """
    memory = state.request.memory
    assert memory is not None
    work = MemoryWork(is_missed=bool(memory.load))
    state.begin_memory(work)
    target: MemoryTarget | None = None

    def offer() -> tuple[int, bool, bool]:
        """Base position of what is loaded (-1 for nothing), whether something can be stored, whether it is there."""
        nonlocal target
        span = _acquire(runtime, state, tenant) if memory.load else None
        if span is not None:
            state.lease([span])
        target = _target(runtime, state, tenant)
        is_there = target is not None and runtime.store.can_lease(target.key)
        base = -1 if span is None else span.lease.record.base_position
        return base, target is not None, is_there

    offers = runtime.group.gather(offer)
    bases = {base for base, _, _ in offers}
    if memory.load and len(bases) == 1 and -1 not in bases:
        span = state.spans[0]
        state.set_turns([span], end=span.end, turn=0)
        work.loaded, work.delta, work.is_missed = span.end - span.start, span.delta, False
    else:
        state.retain(())
    if work.is_missed or target is None or not all(can for _, can, _ in offers):
        return
    if all(there for _, _, there in offers) and not memory.spans:
        work.name, work.kept = target.name, int(target.token_ids.size)
        runtime.metrics.count("memories", "known")
        return
    work.target = target


def _acquire(
    runtime: FusionRuntime, state: RequestState, tenant: RadixNamespace
) -> LeasedSpan | None:
    """Lease the records of a prompt on this rank, merged where there are two; None unless all are there and fit."""
    rows = wanted(runtime, state, tenant)
    memory, facts = state.request.memory, runtime.facts
    assert memory is not None
    assert facts is not None
    start, end = memory.load[0].start, memory.load_end
    if len(rows) < len(memory.load) or state.radix_len > start:
        return None
    leases: list[Lease] = []
    try:
        for (candidate,) in rows:
            found = runtime.store.acquire(candidate.key, candidate.token_ids)
            if found is None:
                break
            leases.append(found)
            if not is_memory(found.record, facts):
                break
        else:
            held = _joined(leases)
            if held is not None:
                leases = []
                return LeasedSpan(match=Match(start, end, rows[0][0].key), lease=held, is_turn=True)
    finally:
        for one in leases:
            one.release()
    return None


def _joined(leases: list[Lease]) -> Lease | None:
    if len(leases) == 1:
        return leases[0]
    one, other = (found.record for found in leases)
    if one.base_position != other.base_position:
        return None

    def release() -> None:
        for found in held:
            found.release()

    held = list(leases)
    merged: Any = MergedMemory(one, other)
    return Lease(cast("ChunkKV | LoadingChunk", merged), 0, one.num_tokens, release)


def _target(
    runtime: FusionRuntime, state: RequestState, tenant: RadixNamespace
) -> MemoryTarget | None:
    memory, facts = state.request.memory, runtime.facts
    assert memory is not None
    assert facts is not None
    store = memory.store
    if store is None or facts.layout.name not in _LAYOUTS:
        return None
    if facts.slices is not None:
        # Each rank would keep other tokens, and only all slices of a token are its latent.
        runtime.say_once(
            "memory slices", "No memory is made: latents are sliced over the ranks (TPLA)."
        )
        return None
    if any(rules_of(layer).sliding_window is not None for layer in facts.layers):
        # A window counts slots; where tokens were evicted it would reach too far.
        runtime.say_once(
            "memory window", "No memory is made: the model has layers with a sliding window."
        )
        return None
    start, prompt = state.request.prefix_len, state.prompt
    count = min(store.budget, store.end - start)
    try:
        ids = as_token_ids(prompt[store.end - count : store.end])
        as_token_ids(prompt[: store.end])
    except ChunkCacheError:
        return None  # ids that the engine made
    rule = create_rule(store.rule)
    name = memory_id(
        memory.load[0].id if memory.load else "",
        prompt[:start],
        prompt[_block_start(state, memory) : store.end],
        prompt[store.end :],
        rule.identity,
        store.budget,
        store.own,
        store.own_share,
    )
    context = context_of(facts, name, prompt[:start], tenant)
    first = first_query(state, memory)
    last = {"none": first, "window": store.end}.get(rule.probe, int(prompt.size))
    return MemoryTarget(
        name=name,
        key=ChunkKey.of(context, ids),
        context=context,
        token_ids=ids,
        owner=tenant.owner,
        rule=rule,
        start=start,
        end=store.end,
        first_query=first,
        last_query=last,
        own=store.own,
        free=own_free(store.budget, store.own_share),
    )
