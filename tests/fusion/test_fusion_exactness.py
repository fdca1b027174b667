"""What must be exact: ratio 1, a chunk in its own place, layer 0, isolation, every request without spans."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from fusion_helpers import CHUNK, PREFIX, largest_difference, lay_out, logprobs, report, tokens

FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "deepseek_v2"]


def slot_kv(local, req, layer):
    """K and V of a running request's positions, in order."""
    runner = local.scheduler.tp_worker.model_runner
    row = runner.req_to_token_pool.req_to_token[req.kv.req_pool_idx]
    slots = row[: len(req.origin_input_ids)].long()
    pool = runner.token_to_kv_pool
    return pool.get_key_buffer(layer)[slots].clone(), pool.get_value_buffer(layer)[slots].clone()


def prefilled(local, ids, **fields):
    """A request that has just been prefilled and still holds its slots."""
    req = local.submit(ids, 8, **fields)
    while not req.output_ids:
        local.step()
    return req


@pytest.mark.parametrize("family", FAMILIES)
def test_ratio_one_equals_plain_prefill_and_reuse_does_not(engine, family):
    local = engine(family)
    assert local.runtime.is_on, local.runtime.off_reason
    prefix, question = tokens(PREFIX, 1), tokens(9, 2)
    chunks = [tokens(CHUNK, 10 + i) for i in range(4)]
    for chunk in chunks:
        local.build(prefix, chunk)
    ids, spans = lay_out(chunks[::-1], question, prefix)
    local.flush()
    plain = local.ask(ids, fusion={"mode": "off"})
    for policy in ("full", "epic:1.0", "query:1.0", "cacheblend:1.0", "adaptive:1.0"):
        local.flush()
        fusion = {"spans": spans, "policy": policy}
        if policy == "adaptive:1.0":
            fusion["options"] = {"max_ratio": 1.0}
        fused = local.ask(ids, fusion=fusion)
        assert report(fused)["recomputed_tokens"] == 3 * CHUNK  # the first is in its own place
        # And nothing beside: no check, no scoring pass.
        assert report(fused)["computed_fraction"] == round(1 - CHUNK / len(ids), 6)
        assert largest_difference(plain, fused) < 2e-4
    # The control: what is compared above can differ, and does when nothing is recomputed.
    local.flush()
    reused = local.ask(ids, fusion={"spans": spans, "policy": "reuse"})
    assert report(reused)["reused_tokens"] == 4 * CHUNK
    assert abs(logprobs(reused)[0] - logprobs(plain)[0]) > 1e-3


def edited(chunk, *places):
    return [257 - t if i in places else t for i, t in enumerate(chunk)]


LONG = tokens(100, 30)


@pytest.mark.parametrize(
    ("stored", "stands", "num_exact"),
    [
        ([LONG], LONG, 100),
        # The same length, a date in it changed: what stands behind the date has seen another date.
        ([LONG], edited(LONG, 0, 1, 2), 0),
        ([edited(LONG, 70)], LONG, 70),
        # The beginning of one chunk, then the rest of a longer one whose own beginning is another.
        ([LONG[:70], edited([*LONG, *LONG[:50]], 3)], [*LONG, *LONG[:50]], 16),
        # The same, but it begins alike: all of it is exact.
        ([LONG[:70], [*LONG, *LONG[:50]]], [*LONG, *LONG[:50]], 150),
        ([LONG], LONG[10:], 0),
        ([LONG], [*LONG[:10], *LONG], 0),
    ],
    ids=["whole", "edited", "cut", "continued", "nested", "headless", "pushed"],
)
@pytest.mark.parametrize("warm", [0, 5])
def test_what_is_not_recomputed_with_ratio_one_is_exact(
    engine, monkeypatch, stored, stands, num_exact, warm
):
    local = engine("llama")
    searching = dataclasses.replace(local.runtime.config, automatic=True, passage_tokens=0)
    monkeypatch.setattr(local.runtime, "config", searching)
    monkeypatch.setattr(local.runtime, "passage", local.runtime.passage[:0])
    prefix = tokens(PREFIX, 1)
    for chunk in stored:
        local.build(prefix, chunk)
    ids, spans = lay_out([stands], tokens(9, 2), prefix)
    local.flush()
    plain = prefilled(local, ids, fusion={"mode": "off"})
    wanted = [slot_kv(local, plain, layer) for layer in range(5)]
    local.run(plain)
    for fusion in ({"policy": "full"}, {"policy": "full", "spans": spans}):
        local.flush()
        local.ask([*ids[: PREFIX + warm], 257 - ids[PREFIX + warm]], 1, fusion={"mode": "off"})
        fused = prefilled(local, ids, fusion=fusion)
        for layer in range(5):
            for got, right in zip(slot_kv(local, fused, layer), wanted[layer], strict=True):
                torch.testing.assert_close(got, right, rtol=0, atol=5e-4)
        local.run(fused)
        assert largest_difference(plain, fused) < 2e-4
        mine = report(fused)
        assert mine["exact_prefix_tokens"] == PREFIX + warm
        assert mine["reused_tokens"] == max(0, num_exact - warm)


@pytest.mark.parametrize("size", [12, 150], ids=["short", "long"])
def test_what_a_forward_really_computes_stays_within_the_ratio(engine, size):
    local = engine("llama")
    prefix, question = tokens(PREFIX, 1), tokens(9, 2)
    chunks = [tokens(size, 10 + i) for i in range(4)]
    for chunk in chunks:
        local.build(prefix, chunk)
    ids, spans = lay_out(chunks[::-1], question, prefix)
    for name in ("cacheblend", "adaptive", "query", "epic"):
        for ratio in (0.15, 0.45, 0.8, 0.97):
            local.flush()
            local.ask([*prefix, 3], 1, fusion={"mode": "off"})
            fusion = {"spans": spans, "policy": name, "ratio": ratio}
            if name == "adaptive":
                fusion["options"] = {"coverage": 0.0, "max_ratio": ratio}
            got = report(local.ask(ids, 1, fusion=fusion))
            reused = 3 * size  # the first chunk stands in its own place
            work = got["computed_fraction"] * (len(ids) - PREFIX) - len(question)
            assert -1e-3 < work <= ratio * reused + 1e-3, (name, ratio)
            # A token is computed whole or not, and the scoring pass ends inside its last layer, for which it
            # is charged whole: not more than that is left unspent.
            if name in ("query", "epic"):
                # A draft is paid for in full and may come out shorter.
                unspent = 1 + 0.2 * len(question) + (4 if name == "query" else 0)
                assert work > ratio * reused - unspent
                assert got["recomputed_tokens"] > 0


def test_ratio_one_gives_the_same_greedy_tokens_on_twenty_prompts(engine):
    local = engine("llama")
    prefix = tokens(PREFIX, 1)
    chunks = [tokens(25, 100 + i) for i in range(6)]
    for chunk in chunks:
        local.build(prefix, chunk)
    worst_fused = worst_floor = 0.0
    for trial in range(20):
        order = torch.randperm(6, generator=torch.Generator().manual_seed(trial)).tolist()[:3]
        ids, spans = lay_out([chunks[i] for i in order], tokens(7, 500 + trial), prefix)
        local.flush()
        plain = local.ask(ids, 8, fusion={"mode": "off"})
        # The noise floor: the same plain prefill in other batches, cut in pieces by warm prefixes.
        local.flush()
        for cut in (PREFIX, PREFIX + 25, PREFIX + 50):
            local.ask(ids[:cut], 1, fusion={"mode": "off"})
        again = local.ask(ids, 8, fusion={"mode": "off"})
        worst_floor = max(worst_floor, largest_difference(plain, again))
        local.flush()
        fused = local.ask(ids, 8, fusion={"spans": spans, "policy": "full"})
        worst_fused = max(worst_fused, largest_difference(plain, fused))
    print(f"max |dlogprob|: fused {worst_fused:.2e}, floor {worst_floor:.2e}")
    assert worst_fused <= max(3 * worst_floor, 1e-5)


def test_a_chunk_in_its_own_place_keeps_its_bits_and_a_moved_one_the_rotation_bound(engine):
    local = engine("llama")
    prefix, question = tokens(PREFIX, 1), tokens(9, 2)
    first, second = tokens(CHUNK, 10), tokens(CHUNK, 11)
    local.build(prefix, first)
    local.build(prefix, second)
    records = [
        local.runtime.store.acquire(key, ids) for key, ids in keys_of(local, [first, second])
    ]
    ids, spans = lay_out([first, second], question, prefix)
    local.flush()
    req = prefilled(local, ids, fusion={"spans": spans, "policy": "reuse"})
    own, moved = slice(PREFIX, PREFIX + CHUNK), slice(PREFIX + CHUNK, PREFIX + 2 * CHUNK)
    for layer in range(5):
        k, v = slot_kv(local, req, layer)
        assert torch.equal(k[own], records[0].record.layer(layer).k)
        assert torch.equal(v[own], records[0].record.layer(layer).v)
        assert not torch.equal(k[moved], records[1].record.layer(layer).k)
        assert torch.equal(v[moved], records[1].record.layer(layer).v)
    local.run(req)
    # Layer 0 knows only tokens and positions: loaded or computed, K and V there are those of plain prefill.
    local.flush()
    plain = prefilled(local, ids, fusion={"mode": "off"})
    k_plain, v_plain = slot_kv(local, plain, 0)
    local.run(plain)
    local.flush()
    epic = prefilled(local, ids, fusion={"spans": spans, "policy": "epic:0.2"})
    k_epic, v_epic = slot_kv(local, epic, 0)
    computed = torch.ones(len(ids), dtype=torch.bool)
    computed[own] = False
    computed[moved] = False
    computed[PREFIX + CHUNK : PREFIX + CHUNK + 8] = True  # 20% of the one moved chunk
    assert torch.equal(k_epic[computed], k_plain[computed])
    assert torch.equal(v_epic[computed], v_plain[computed])
    torch.testing.assert_close(k_epic, k_plain, rtol=0, atol=2e-5)
    assert torch.equal(v_epic, v_plain)
    local.run(epic)
    for lease in records:
        lease.release()


def keys_of(local, chunks):
    by_ids = {}
    stored = local.runtime.store.keys()
    for key in stored:
        for chunk in chunks:
            lease = local.runtime.store.acquire(key, chunk)
            if lease is not None:
                by_ids[tuple(chunk)] = key
                lease.release()
    return [(by_ids[tuple(chunk)], chunk) for chunk in chunks]


def test_exact_and_fused_requests_interleaved_leave_the_exact_ones_untouched(engine):
    local = engine("llama")
    prefix = tokens(PREFIX, 1)
    chunks = [tokens(CHUNK, 10 + i) for i in range(4)]
    jobs = []
    for turn in range(3):
        order = [(turn + i) % 4 for i in range(3)]
        jobs.append(lay_out([chunks[i] for i in order], tokens(6, 300 + turn), prefix))
    # As stock SGLang would do it: the same plain requests in the same order, nothing fused in between.
    stock = [local.ask(ids, 6, fusion={"mode": "off"}) for ids, _ in jobs for _ in range(2)]
    local.fresh()
    for chunk in chunks:
        local.build(prefix, chunk)
    local.flush()
    interleaved = []
    for ids, spans in jobs:
        interleaved.append(local.ask(ids, 6, fusion={"mode": "off"}))
        fused = local.ask(ids, 6, fusion={"spans": spans, "policy": "reuse"})
        assert report(fused)["fallback"] == "in_exact_prefix"  # the plain one has published it all
        local.ask([*ids[:-1], 3], 6, fusion={"spans": spans, "policy": "query:0.3"})
        interleaved.append(local.ask(ids, 6, fusion={"mode": "off"}))
    for one, two in zip(stock, interleaved, strict=True):
        assert list(one.output_ids) == list(two.output_ids)
        assert logprobs(one) == logprobs(two)
        assert one.cached_tokens == two.cached_tokens
    # And the other way round: a fused request comes first and must leave nothing behind but the prefix.
    for ids, spans in jobs:
        local.flush()
        alone = local.ask(ids, 6, fusion={"mode": "off"})
        local.flush()
        fused = local.ask(ids, 6, fusion={"spans": spans, "policy": "reuse"})
        assert report(fused)["reused_tokens"] == 3 * CHUNK
        after = local.ask(ids, 6, fusion={"mode": "off"})
        assert after.cached_tokens == PREFIX
        assert list(after.output_ids) == list(alone.output_ids)
        assert largest_difference(alone, after) < 1e-4


def test_requests_without_spans_are_those_of_stock_sglang(engine, monkeypatch):
    from rag_pipeline.sglang_plugin.fusion.runtime import runtime as runtime_module

    local = engine("llama")
    prompts = [tokens(30 + 7 * i, 40 + i) for i in range(4)]
    local.build(tokens(PREFIX, 1), tokens(CHUNK, 10))  # something is stored, so prompts are scanned
    local.flush()
    with_plugin = [local.submit(ids, 6) for ids in prompts]
    local.run(*with_plugin)
    local.flush()
    monkeypatch.setattr(runtime_module, "_RUNTIME", None)  # no hook does anything without a runtime
    without = [local.submit(ids, 6) for ids in prompts]
    local.run(*without)
    monkeypatch.undo()
    for one, two in zip(with_plugin, without, strict=True):
        assert list(one.output_ids) == list(two.output_ids)
        assert logprobs(one) == logprobs(two)
        assert one.customized_info is None
