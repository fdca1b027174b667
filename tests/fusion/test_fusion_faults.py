"""A fault inside a fused forward: the same batch is prefilled as usual, nothing wrong stays behind."""

from __future__ import annotations

import logging

import pytest
import torch
from fusion_helpers import (
    CHUNK,
    CHUNKS,
    chunk_limit,
    enter_prefix,
    largest_difference,
    lay_out,
    logprobs,
    report,
    store_chunks,
    tokens,
)


def stored(local):
    store_chunks(local, CHUNKS)
    local.runtime.pass_succeeded()
    local.runtime._said.clear()
    return local


def pool_rows(local, req):
    """K and V of every layer at the positions of a running request's prompt."""
    runner = local.scheduler.tp_worker.model_runner
    row = runner.req_to_token_pool.req_to_token[req.kv.req_pool_idx]
    slots = row[: len(req.origin_input_ids)].long()
    pool = runner.token_to_kv_pool
    return torch.stack(
        [
            torch.stack([pool.get_key_buffer(i)[slots], pool.get_value_buffer(i)[slots]])
            for i in range(5)
        ]
    )


def prefill(local, *reqs):
    while not all(req.output_ids for req in reqs):
        local.step()


@pytest.fixture
def break_at(monkeypatch):
    """Make a step of the fused path fail at a layer; returns the list of layers where it did."""
    from chunk_cache.policies.signals import DeviationObserver, MassObserver
    from rag_pipeline.sglang_plugin.fusion.forward import layer_pass as attention
    from rag_pipeline.sglang_plugin.fusion.forward import loader

    def install(step, layer):
        failed = []

        def wrapped(original):
            def replacement(self, layer_id, *args, **kwargs):
                at = layer_id if isinstance(layer_id, int) else int(layer_id.layer_id)
                if at == layer:
                    failed.append(at)
                    raise RuntimeError("injected")
                return original(self, layer_id, *args, **kwargs)

            return replacement

        place, name = {
            "load": (loader.Loader, "ensure"),
            "layer": (attention.FusedPass, "_run_layer"),
            "mass": (MassObserver, "after_write"),
            "deviation": (DeviationObserver, "before_write"),
        }[step]
        monkeypatch.setattr(place, name, wrapped(getattr(place, name)))
        return failed

    return install


@pytest.mark.parametrize(
    ("policy", "options", "step", "layer", "reason"),
    [
        ("reuse", {}, "load", 0, "fused_pass_error"),
        ("epic:0.4", {}, "load", 3, "fused_pass_error"),
        # The scoring pass has run, and written, before the final pass fails in the last layer.
        ("query:0.6", {"draft_tokens": 0}, "layer", 4, "fused_pass_error"),
        # With a draft the scoring pass goes to the last layer, and fails there.
        ("query:0.6", {}, "layer", 4, "internal_error"),
        ("query:0.6", {}, "mass", 2, "internal_error"),
        ("cacheblend:0.9", {}, "deviation", 1, "internal_error"),
    ],
)
def test_a_failed_pass_is_plain_prefill_to_the_bit(
    engine, break_at, caplog, policy, options, step, layer, reason
):
    local = stored(engine("llama"))
    ids, spans = lay_out(CHUNKS[::-1], tokens(9, 3))
    plain = local.submit(ids, 6, fusion={"mode": "off"})
    prefill(local, plain)
    wanted = pool_rows(local, plain)
    local.run(plain)
    failed = break_at(step, layer)
    for turn in range(2):
        local.flush()
        with caplog.at_level(logging.ERROR, "rag_pipeline.sglang_plugin.fusion"):
            fusion = {"spans": spans, "policy": policy} | ({"options": options} if options else {})
            req = local.submit(ids, 6, fusion=fusion)
            prefill(local, req)
        assert failed
        assert torch.equal(pool_rows(local, req), wanted)
        local.run(req)
        assert list(req.output_ids) == list(plain.output_ids)
        assert logprobs(req) == logprobs(plain)
        mine = report(req)
        assert (mine["fallback"], mine["computed_fraction"]) == (reason, 1.0)
        assert (mine["reused_tokens"], mine["fresh_tokens"]) == (0, len(ids))
        assert local.runtime.metrics.counts[f"fallbacks.{reason}"] == turn + 1
    said = [r for r in caplog.records if "prefilled as usual" in r.message]
    assert len(said) == 1
    assert said[0].exc_info is not None


def test_a_failed_pass_in_a_mixed_batch_leaves_every_request_right(engine, break_at):
    local = stored(engine("llama"))
    jobs = []
    for i, policy in enumerate(["off", "reuse", "query:0.6", "off", "cacheblend:0.9"]):
        ids, spans = lay_out([CHUNKS[(i + k) % 4] for k in (0, 2, 1)], tokens(5 + i, 200 + i))
        fusion = {"mode": "off"} if policy == "off" else {"spans": spans, "policy": policy}
        jobs.append((ids, fusion))
    enter_prefix(local)
    plain = [local.submit(ids, 6, fusion={"mode": "off"}) for ids, _ in jobs]
    local.run(*plain)
    local.flush()
    enter_prefix(local)
    failed = break_at("load", 4)
    mixed = [local.submit(ids, 6, fusion=fusion) for ids, fusion in jobs]
    assert local.step().batch_size() == len(jobs)
    local.run(*mixed)
    assert failed
    for one, two in zip(plain, mixed, strict=True):
        assert list(one.output_ids) == list(two.output_ids)
        assert logprobs(one) == logprobs(two)
    assert [r.customized_info is None for r in mixed] == [True, False, False, True, False]
    # Nothing of the failed ones was published but their exact prefix.
    again = local.ask(jobs[1][0], 6, fusion={"mode": "off"})
    assert list(again.output_ids) == list(plain[1].output_ids)


@pytest.mark.parametrize(
    ("policy", "settings"),
    [("epic:0.4", {}), ("query:0.3", {}), ("query:0.3", {"page_size": 16})],
    ids=["epic", "query", "query, page 16"],
)
def test_a_fault_in_a_later_piece_rewrites_the_earlier_ones_too(
    engine, monkeypatch, policy, settings
):
    from rag_pipeline.sglang_plugin.fusion.forward import loader

    local = stored(engine("llama", **settings))
    ids, spans = lay_out(CHUNKS[::-1], tokens(70, 3))
    plain = local.submit(ids, 6, fusion={"mode": "off"})
    prefill(local, plain)
    wanted = pool_rows(local, plain)
    local.run(plain)
    local.flush()
    original = loader.Loader.ensure
    loaded = []

    def fails_in_the_last_piece(self, layer_id, *args):
        if len(loaded) > 1 and layer_id == 3:
            raise RuntimeError("injected")
        loaded.extend([1] if layer_id == 4 else [])
        return original(self, layer_id, *args)

    monkeypatch.setattr(loader.Loader, "ensure", fails_in_the_last_piece)
    with chunk_limit(local, 48):
        req = local.submit(ids, 6, fusion={"spans": spans, "policy": policy})
        prefill(local, req)
    assert len(loaded) == 2  # two pieces went well
    assert report(req)["fallback"] == "fused_pass_error"
    # Cut in other pieces than the plain one: equal within rounding, everywhere.
    torch.testing.assert_close(pool_rows(local, req), wanted, rtol=0, atol=5e-4)
    local.run(req)
    assert list(req.output_ids) == list(plain.output_ids)
    assert largest_difference(req, plain) < 5e-4
    local.settle()
    local.runtime.store.check_integrity(expect_idle=True)


def test_many_faults_in_a_row_turn_fusion_off_and_one_success_forgets_them(
    engine, break_at, monkeypatch
):
    local = stored(engine("llama"))
    ids, spans = lay_out(CHUNKS[::-1], tokens(9, 3))
    fusion = {"spans": spans, "policy": "reuse"}
    local.runtime.pass_failed("pass", RuntimeError("one"))
    local.ask(ids, 1, fusion=fusion)
    assert local.runtime._faults == 0
    break_at("load", 2)
    try:
        for turn in range(9):
            local.flush()
            req = local.ask(ids, 1, fusion=fusion)
            assert report(req)["fallback"] == ("fused_pass_error" if turn < 8 else "fusion_off")
        assert "8 fused forwards in a row" in local.runtime.off_reason
    finally:
        local.runtime.off_reason = ""
        local.runtime.pass_succeeded()


def test_a_chunk_that_cannot_be_captured_is_answered_all_the_same(engine, monkeypatch):
    from rag_pipeline.sglang_plugin.fusion.forward import model_forward as forward

    local = stored(engine("llama"))
    ids, spans = lay_out([tokens(CHUNK, 50)], tokens(9, 3))
    plain = local.ask(ids, 4, fusion={"mode": "off"})
    local.flush()
    with monkeypatch.context() as patch:
        patch.setattr(forward, "capture_chunk", lambda *a, **k: 1 / 0)
        req = local.ask(ids, 4, fusion={"spans": spans})
    assert logprobs(req) == logprobs(plain)
    assert report(req)["built_chunks"] == 0
    assert local.runtime.metrics.counts["spans.not_stored"] == 1
    local.flush()
    assert report(local.ask(ids, 4, fusion={"spans": spans}))["built_chunks"] == 1
