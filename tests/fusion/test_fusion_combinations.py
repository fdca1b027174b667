"""Fused requests among everything else that a scheduler does."""

from __future__ import annotations

import pytest
from fusion_helpers import (
    CHUNK,
    CHUNKS,
    PREFIX,
    PREFIX_IDS,
    agree,
    enter_prefix,
    lay_out,
    report,
    store_chunks,
    tokens,
)


def stored(local):
    store_chunks(local, CHUNKS)
    return local


def test_mixed_batch_gives_every_request_what_it_gets_alone(engine):
    local = stored(engine("llama"))
    jobs = []
    for i, policy in enumerate(["off", "reuse", "full", "query:0.6", "cacheblend:0.6", "off"]):
        ids, spans = lay_out([CHUNKS[(i + k) % 4] for k in (0, 2, 1)], tokens(5 + i, 200 + i))
        jobs.append(
            (ids, {"mode": "off"} if policy == "off" else {"spans": spans, "policy": policy})
        )
    alone = []
    for ids, fusion in jobs:
        local.flush()
        enter_prefix(local)
        alone.append(local.ask(ids, 6, fusion=fusion))
    local.flush()
    enter_prefix(local)
    together = [local.submit(ids, 6, fusion=fusion) for ids, fusion in jobs]
    batch = local.step()
    assert batch.batch_size() == len(jobs)
    local.run(*together)
    for one, two in zip(alone, together, strict=True):
        agree(one, two)
        if one.customized_info:
            assert report(one) == report(two)


def test_decode_rows_of_running_requests_ride_in_a_fused_batch(engine):
    local = stored(engine("llama"))
    ids, spans = lay_out(CHUNKS[::-1], tokens(6, 3))
    other = tokens(50, 4)
    alone, fused_alone = local.ask(other, 12), None
    local.flush()
    fused_alone = local.ask(ids, 4, fusion={"spans": spans, "policy": "epic:0.3"})
    local.flush()
    local.scheduler.is_mixed_chunk = True
    try:
        running = local.submit(other, 12, return_logprob=False)
        for _ in range(3):
            local.step()
        fused = local.submit(
            ids, 4, fusion={"spans": spans, "policy": "epic:0.3"}, return_logprob=False
        )
        batch = local.step()
        assert batch.forward_mode.is_mixed()
        assert batch.batch_size() == 2
        local.run(running, fused)
    finally:
        local.scheduler.is_mixed_chunk = False
    assert list(running.output_ids) == list(alone.output_ids)
    assert list(fused.output_ids) == list(fused_alone.output_ids)
    assert report(fused) == report(fused_alone)


@pytest.mark.parametrize("between", [[], tokens(5, 90)], ids=["", "fresh text between chunks"])
@pytest.mark.parametrize(
    "policy", ["reuse", "full", "epic:0.5", "query:0.6", "query:1.0", "cacheblend:0.6"]
)
def test_a_span_cut_by_a_chunk_boundary(engine, policy, between):
    local = stored(engine("llama"))
    ids, spans = lay_out(CHUNKS[::-1], tokens(9, 3), between=between)
    enter_prefix(local)
    whole = local.ask(ids, 4, fusion={"spans": spans, "policy": policy})
    local.flush()
    enter_prefix(local)
    local.scheduler.chunked_prefill_size = 33
    try:
        req = local.submit(ids, 4, fusion={"spans": spans, "policy": policy})
        pieces = 0
        while not req.output_ids:
            batch = local.step()
            pieces += batch is not None
        local.run(req)
    finally:
        local.scheduler.chunked_prefill_size = None
    if policy == "reuse":
        assert pieces == 1  # few rows are computed: the budget counts those, not the 169 tokens
    else:
        assert pieces > 1
    agree(whole, req)
    mine, other = report(req), report(whole)
    assert {k: mine[k] for k in mine if k.endswith("_tokens")} == {
        k: other[k] for k in other if k.endswith("_tokens")
    }


@pytest.mark.parametrize(
    "settings",
    [{"page_size": 16}, {"disable_overlap_schedule": False}],
    ids=["page 16", "overlap"],
)
def test_page_size_and_overlap_scheduling(engine, settings):
    local = stored(engine("llama", **settings))
    assert local.runtime.is_on, local.runtime.off_reason
    ids, spans = lay_out(CHUNKS[::-1], tokens(9, 3))
    plain = local.ask(ids, 6, fusion={"mode": "off"})
    local.flush()
    full = local.ask(ids, 6, fusion={"spans": spans, "policy": "full"})
    agree(plain, full)
    # Published is what is exact and nothing more, down to whole pages.
    after = local.ask(ids, 6, fusion={"mode": "off"})
    page = settings.get("page_size", 1)
    assert after.cached_tokens == PREFIX // page * page
    agree(plain, after)
    local.flush()
    query = [
        local.submit(ids, 6, fusion={"spans": spans, "policy": "query:0.6"}),
        local.submit(tokens(33, 8), 6),
        local.submit(ids, 6, fusion={"spans": spans, "policy": "reuse"}),
    ]
    local.run(*query)
    assert report(query[0])["recomputed_tokens"] > 0
    assert report(query[2])["reused_tokens"] == 4 * CHUNK


def test_odd_layouts(engine):
    local = stored(engine("llama"))
    question = tokens(7, 3)
    a, b = CHUNKS[0], CHUNKS[1]

    def exact(ids, spans, policy="full"):
        local.flush()
        plain = local.ask(ids, 4, fusion={"mode": "off"})
        local.flush()
        fused = local.ask(ids, 4, fusion={"spans": spans, "policy": policy})
        agree(plain, fused)
        parts = report(fused)
        assert parts["prompt_tokens"] == len(ids)
        assert len(ids) == sum(
            parts[k]
            for k in ("exact_prefix_tokens", "reused_tokens", "recomputed_tokens", "fresh_tokens")
        )
        return parts

    # A chunk twice: one record, two places, of which the first is its own: exact, never recomputed.
    assert exact(*lay_out([b, a, b], question))["recomputed_tokens"] == 2 * CHUNK
    # An empty chunk between two others.
    ids, spans = lay_out([b, a], question)
    assert (
        exact(ids, [spans[0], spans[1], spans[1], spans[1], *spans[2:]])["reused_tokens"] == CHUNK
    )
    # The whole prompt is cached: the last token is computed all the same.
    ids, spans = lay_out([b, a], [])
    assert exact(ids, spans)["fresh_tokens"] == PREFIX
    local.flush()
    reused = local.ask(ids, 4, fusion={"spans": spans, "policy": "reuse"})
    assert report(reused)["reused_tokens"] == 2 * CHUNK - 1
    # Only one chunk, in its original place: nothing is approximate, whatever the policy.
    ids, spans = lay_out([a], question)
    for policy in ("reuse", "query:0.2", "epic:0.2", "cacheblend:0.5"):
        parts = exact(ids, spans, policy)
        assert (parts["reused_tokens"], parts["recomputed_tokens"]) == (CHUNK, 0)
    # Text between chunks is fresh.
    ids = [*PREFIX_IDS, *b, *tokens(5, 77), *a, *question]
    spans = [PREFIX, PREFIX + CHUNK, PREFIX + CHUNK + 5, PREFIX + 2 * CHUNK + 5]
    assert exact(ids, spans)["fresh_tokens"] == PREFIX + 5 + len(question)


def test_sixty_four_chunks(engine):
    local = engine("llama")
    chunks = [tokens(17 + i % 5, 1000 + i) for i in range(64)]
    for chunk in chunks:
        local.build(PREFIX_IDS, chunk)
    ids, spans = lay_out(chunks[::-1], tokens(9, 3))
    local.flush()
    plain = local.ask(ids, 2, fusion={"mode": "off"})
    local.flush()
    full = local.ask(ids, 2, fusion={"spans": spans, "policy": "full"})
    agree(plain, full)
    local.flush()
    query = local.ask(ids, 2, fusion={"spans": spans, "policy": "query:0.3"})
    assert report(query)["reused_tokens"] + report(query)["recomputed_tokens"] == sum(
        map(len, chunks)
    )
    assert report(query)["computed_fraction"] < 0.4


def test_abort_in_mid_flight_gives_everything_back(engine):
    from sglang.srt.managers.io_struct import AbortReq

    local = stored(engine("llama"))
    ids, spans = lay_out(CHUNKS[::-1], tokens(9, 3))
    store = local.runtime.store
    # In the queue, in the middle of its prompt, and while decoding.
    local.scheduler.chunked_prefill_size = 40
    try:
        cut = local.submit(ids, 4, fusion={"spans": spans, "policy": "full"})
        local.step()
        assert store.stats().in_use_now == 4
        queued = local.submit(ids, 4, fusion={"spans": spans, "policy": "reuse"})
        local.scheduler.abort_request(AbortReq(rid=cut.rid))
        local.scheduler.abort_request(AbortReq(rid=queued.rid))
        local.settle()
    finally:
        local.scheduler.chunked_prefill_size = None
    del queued
    assert store.stats().in_use_now == 0
    decoding = local.submit(ids, 50, fusion={"spans": spans, "policy": "reuse"})
    for _ in range(5):
        local.step()
    local.scheduler.abort_request(AbortReq(rid=decoding.rid))
    local.settle()
    store.check_integrity(expect_idle=True)
    local.flush()  # fails if a slot or a lock were lost
    plain = local.ask(ids, 4, fusion={"mode": "off"})
    local.flush()
    agree(plain, local.ask(ids, 4, fusion={"spans": spans, "policy": "full"}))


def test_retraction_under_memory_pressure(engine, monkeypatch):
    from sglang.srt.managers import scheduler as module

    local = stored(engine("llama"))
    jobs = [lay_out([CHUNKS[(i + k) % 4] for k in range(3)], tokens(6, 60 + i)) for i in range(4)]
    calm = []
    for ids, spans in jobs:
        local.flush()
        enter_prefix(local)
        calm.append(local.ask(ids, 20, fusion={"spans": spans, "policy": "full"}))
    local.flush()
    monkeypatch.setattr(module, "TEST_RETRACT", True)
    reqs = [local.submit(ids, 20, fusion={"spans": s, "policy": "full"}) for ids, s in jobs]
    local.run(*reqs)
    assert sum(req.retraction_count for req in reqs) > 0
    for one, two in zip(calm, reqs, strict=True):
        agree(one, two, 2e-3)
    local.runtime.store.check_integrity(expect_idle=True)


def test_two_requests_share_chunks_and_one_of_them_ends_first(engine):
    local = stored(engine("llama"))
    ids, spans = lay_out(CHUNKS, tokens(6, 3))
    short = local.submit(ids, 1, fusion={"spans": spans, "policy": "query:0.6"})
    long = local.submit([*ids, 9], 30, fusion={"spans": spans, "policy": "query:0.6"})
    local.run(short, long)
    local.flush()
    again = local.ask([*ids, 9], 30, fusion={"spans": spans, "policy": "query:0.6"})
    agree(long, again)
