"""A request that SGLang refuses and matches anew: nothing of the first attempt is left, nothing shared is written."""

from __future__ import annotations

import pytest
import torch
from fusion_helpers import (
    CHUNK,
    CHUNKS,
    PREFIX,
    PREFIX_IDS,
    agree,
    attribute,
    enter_prefix,
    lay_out,
    report,
    store_chunks,
    tokens,
)

ORDER = CHUNKS[::-1]


def whole_pool(local):
    """K and V of every layer and slot."""
    pool = local.scheduler.tp_worker.model_runner.token_to_kv_pool
    return [
        get(i).clone() for i in range(5) for get in (pool.get_key_buffer, pool.get_value_buffer)
    ]


def prefill_beside_the_tree(local, req, shared):
    """Prefill a request; whether the KV that it shares with the tree has the bits that it had before."""
    before = whole_pool(local)
    while not req.output_ids:
        local.step()
    assert req.kv.cache_protected_len >= shared
    row = local.scheduler.tp_worker.model_runner.req_to_token_pool.req_to_token
    slots = row[req.kv.req_pool_idx][:shared].long()
    return all(
        torch.equal(old[slots], new[slots])
        for old, new in zip(before, whole_pool(local), strict=True)
    )


def budget(local, rows):
    """Most prompt tokens of a batch, unless its first request alone has more."""
    return attribute(local.scheduler, "max_prefill_tokens", rows)


def refused_while_the_tree_grows(local, shared, policy):
    """A fused request that is refused once, while an exact one puts `shared` tokens of its prompt into the tree."""
    store_chunks(local, CHUNKS)
    enter_prefix(local)
    ids, spans = lay_out(ORDER, tokens(9, 3))
    leader = ids[:shared] + tokens(len(ids) - shared, 77)
    local.runtime.metrics.counts.clear()
    with budget(local, len(leader) - PREFIX + 5):
        exact = local.submit(leader, 2, fusion={"mode": "off"})
        req = local.submit(ids, 6, fusion={"spans": spans, "policy": policy})
        batch = local.step()
        assert batch.reqs == [exact]
    return ids, req


@pytest.mark.parametrize("policy", ["query:0.6", "epic:0.4", "cacheblend:0.9", "full"])
@pytest.mark.parametrize(
    "shared", [PREFIX + 2 * CHUNK + 13, PREFIX + 4 * CHUNK], ids=["cut", "all"]
)
def test_a_refused_request_is_resolved_anew_and_the_tree_keeps_its_bits(engine, policy, shared):
    local = engine("llama")
    ids, req = refused_while_the_tree_grows(local, shared, policy)
    # It waits and holds nothing.
    local.runtime.store.check_integrity(expect_idle=True)
    assert prefill_beside_the_tree(local, req, shared)
    local.run(req)
    mine = report(req)
    assert mine["exact_prefix_tokens"] == shared
    counts = local.runtime.metrics.counts
    assert counts["spans.hit"] == -(-(PREFIX + 4 * CHUNK - shared) // CHUNK)  # of one attempt
    assert counts["fallbacks.protected_write"] == 0
    assert mine["fallback"] == ("" if shared < PREFIX + 4 * CHUNK else "in_exact_prefix")
    # As if it had come when the tree was as it is now.
    local.flush()
    local.ask([*ids[:shared], 3], 1, fusion={"mode": "off"})
    spans = lay_out(ORDER, [])[1]
    again = local.ask(ids, 6, fusion={"spans": spans, "policy": policy})
    assert report(again) == mine
    agree(again, req)


@pytest.mark.parametrize("policy", ["query:0.6", "cacheblend:0.9"])
def test_a_plan_that_would_write_into_the_tree_is_refused_at_the_last_moment(
    engine, monkeypatch, policy
):
    from rag_pipeline.sglang_plugin.fusion.admission import prefill_adder as batching

    local = engine("llama")
    shared = PREFIX + 2 * CHUNK + 13
    admit = batching.admit

    def admit_once(runtime, req, state):
        # The fault itself: the plan of an attempt that was refused is kept for the next.
        if not state.resolved:
            admit(runtime, req, state)

    with monkeypatch.context() as patch:
        patch.setattr(batching, "admit", admit_once)
        patch.setattr(batching.RequestState, "drop", lambda state: None)
        ids, req = refused_while_the_tree_grows(local, shared, policy)
        assert batching.state_of(req).radix_len == PREFIX
        assert prefill_beside_the_tree(local, req, shared)
    local.run(req)
    assert report(req)["fallback"] == "protected_write"
    assert local.runtime.metrics.counts["fallbacks.protected_write"] == 1
    local.runtime.pass_succeeded()
    local.flush()
    plain = local.ask(ids, 6, fusion={"mode": "off"})
    agree(plain, req)


def test_a_prompt_that_sglang_replaces_is_not_planned_from_the_old_one(engine):
    local = engine("llama")
    store_chunks(local, CHUNKS)
    ids, spans = lay_out(ORDER, tokens(9, 3))
    missing, places = lay_out([tokens(CHUNK, 50)], tokens(9, 3))
    reqs = [
        local.submit(ids, 6, fusion={"spans": spans, "policy": "query:0.6"}),
        local.submit(missing, 6, fusion={"spans": places}),
        local.submit(
            PREFIX_IDS + CHUNKS[0], 1, fusion={"mode": "build", "spans": [PREFIX, PREFIX + CHUNK]}
        ),
    ]
    for req in reqs:
        # What SGLang does to a queued request that is aborted or turns out too long.
        req.set_finish_with_abort("too long")
    local.run(*reqs)
    local.settle()
    local.runtime.store.check_integrity(expect_idle=True)
    assert local.runtime._faults == 0
    assert local.runtime.metrics.counts["fallbacks.prompt_changed"] == 3


def test_a_fault_in_the_middle_of_matching_leaves_nothing_leased(engine, monkeypatch):
    local = engine("llama")
    store_chunks(local, CHUNKS)
    ids, spans = lay_out(ORDER, tokens(9, 3))
    fusion = {"spans": spans, "policy": "reuse", "conversation": "c"}
    first = local.ask(ids, 4, fusion=fusion)
    local.flush()
    original, calls = local.runtime.store.acquire_matches, []

    def fails_when_the_turn_is_leased(*args):
        calls.append(1)
        return 1 / 0 if len(calls) > 1 else original(*args)

    monkeypatch.setattr(local.runtime.store, "acquire_matches", fails_when_the_turn_is_leased)
    req = local.ask([*ids, *first.output_ids, *tokens(7, 3)], 2, fusion=fusion)
    assert report(req)["fallback"] == "internal_error"
    local.settle()
    local.runtime.store.check_integrity(expect_idle=True)
    local.runtime._said.clear()
