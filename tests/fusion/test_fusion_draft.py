"""The draft that scores tokens: borrowed slots are left as they were, and without room it is left out."""

from __future__ import annotations

import pytest
import torch
from fusion_helpers import lay_out, logprobs, store_chunks, tokens

from chunk_cache.policies.signals import draft
from rag_pipeline.sglang_plugin.fusion.forward import scratch

QUESTION = tokens(6, 2)
CHUNKS = [tokens(40 + i, 10 + i) for i in range(4)]


def in_order(order):
    return lay_out([CHUNKS[index] for index in order], QUESTION)


@pytest.fixture(params=[1, 16])
def local(engine, request):
    made = engine("llama", page_size=request.param)
    store_chunks(made, CHUNKS)
    return made


def ask(local, order, **options):
    ids, spans = in_order(order)
    fusion = {"spans": spans, "policy": "query:0.9"}
    return local.submit(ids, 5, fusion=fusion | ({"options": options} if options else {}))


def runs(req):
    return req.customized_info["rag_fusion"][0]["runs"]


def allocator(local):
    return local.scheduler.token_to_kv_pool_allocator


def test_borrowed_slots_stay_free_and_are_nobodys(local):
    pool = allocator(local)
    before = pool.get_all_free_pages().clone()
    slots = scratch.borrow_slots(local.scheduler.tp_worker.model_runner, 3, 5)
    assert slots.shape == (3, 5)
    assert slots.unique().numel() == 15
    assert torch.isin(slots // pool.page_size, before).all()
    assert torch.equal(pool.get_all_free_pages(), before)
    everything = int(pool.available_size())
    assert scratch.borrow_slots(local.scheduler.tp_worker.model_runner, 1, everything + 1) is None


def test_a_draft_leaves_the_pool_as_it_found_it(local):
    req = ask(local, [3, 1, 0, 2])
    local.run(req)
    assert local.runtime.metrics.counts["drafts.scored"] == 1
    local.flush()
    assert int(allocator(local).available_size()) == allocator(local).size


def test_drafts_of_one_batch_are_those_of_each_request_alone(local):
    orders = ([3, 1, 0, 2], [2, 0, 3, 1])
    alone = []
    for order in orders:
        alone.append(ask(local, order))
        local.run(alone[-1])
        local.flush()
    together = [ask(local, order) for order in orders]
    local.run(*together)
    assert local.runtime.metrics.counts["drafts.scored"] == 4
    for one, other in zip(alone, together, strict=True):
        assert runs(one) == runs(other)
        torch.testing.assert_close(logprobs(one), logprobs(other), rtol=0, atol=1e-4)


@pytest.mark.parametrize("why", ["no free slots", "end of the context"])
def test_without_room_there_is_no_draft(local, monkeypatch, why):
    drafted = ask(local, [3, 1, 0, 2])
    local.run(drafted)
    local.flush()
    place = "borrow_slots" if why == "no free slots" else "fits"
    monkeypatch.setattr(scratch, place, lambda *_: None if place == "borrow_slots" else False)
    req = ask(local, [3, 1, 0, 2])
    local.run(req)
    counts = local.runtime.metrics.counts
    assert (counts["drafts.scored"], counts["drafts.left_out"]) == (1, 1)
    one, other = (r.customized_info["rag_fusion"][0] for r in (drafted, req))
    assert (other["fallback"], other["recomputed_tokens"]) == ("", one["recomputed_tokens"])
    assert other["computed_fraction"] < one["computed_fraction"]


@pytest.mark.parametrize(
    ("first", "looked_at", "want"),
    [
        (7, 8, [7, 8, 9]),  # the occurrence that is looked at, not the first one
        (7, 3, [7, 5, 6]),
        (42, 3, [42]),  # stands in no chunk
        (1, 0, [1]),  # stands in the system part only
        (9, 9, [9]),  # the question behind the last chunk is no part of it
    ],
)
def test_a_draft_goes_on_as_the_chunk_does(monkeypatch, first, looked_at, want):
    monkeypatch.setattr(draft, "_NEAR", 2)
    prompt = torch.tensor([1, 2, 7, 5, 6, 4, 3, 7, 8, 9, 7, 2])
    mass = torch.zeros(12)
    mass[looked_at] = 1.0
    assert draft.look_up(first, prompt, ((2, 6), (6, 10)), mass, 3) == want
