"""Matching, background builds, tenants, refusals, counters and the self-check, in the real scheduler."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from fusion_helpers import PREFIX, PREFIX_IDS, lay_out, report, tokens

from chunk_cache import ChunkKey, ChunkState
from rag_pipeline.sglang_plugin.fusion.builds import idle as background
from rag_pipeline.sglang_plugin.fusion.request.namespace import RadixNamespace
from rag_pipeline.sglang_plugin.fusion.runtime.build_queue import MissingChunk
from rag_pipeline.sglang_plugin.fusion.runtime.build_share import BuildShare

CHUNK = 80


CHUNKS = [tokens(CHUNK, 10 + i) for i in range(3)]


def turn(local, times):
    for _ in range(times):
        local.step()


def test_a_miss_is_served_as_usual_and_built_when_the_engine_is_idle(engine, monkeypatch):
    local = engine("llama")
    monkeypatch.setattr(local.runtime, "build_share", BuildShare(0.0))
    ids, spans = lay_out(CHUNKS, tokens(9, 3))
    plain = local.ask(ids, 4, fusion={"mode": "off"})
    local.flush()
    first = local.ask(ids, 4, fusion={"spans": spans})
    assert first.output_ids == plain.output_ids
    assert first.logprob.output_token_logprobs_val == plain.logprob.output_token_logprobs_val
    assert report(first)["fallback"] == "miss"
    assert report(first)["fresh_tokens"] == len(ids)
    # The chunk behind the prefix came out of this very prefill; the others wait.
    assert report(first)["built_chunks"] == 1
    counts = local.runtime.metrics.counts
    assert counts["background.queued"] == 2
    assert local.runtime.store.stats().chunks_now == 1
    sent = len(local.sink.sent)
    turn(local, 900)
    assert counts["background.started"] == 2
    assert local.runtime.store.stats().chunks_now == 3
    assert len(local.sink.sent) == sent  # nobody is answered about requests that nobody made
    local.flush()
    second = local.ask(ids, 4, fusion={"spans": spans, "policy": "reuse"})
    assert report(second)["reused_tokens"] == 3 * CHUNK
    assert report(second)["fallback"] == ""


def test_background_builds_wait_for_idleness_and_the_queue_is_bounded(engine, monkeypatch):
    local = engine("llama")
    runtime = local.runtime
    monkeypatch.setattr(runtime, "config", type(runtime.config)(max_background=3, self_check=False))
    monkeypatch.setattr(runtime.build_share, "share", 0.0)
    many = [tokens(30, 400 + i) for i in range(6)]
    ids, spans = lay_out(many, tokens(5, 3))
    local.ask(ids, 1, fusion={"spans": spans})
    assert len(runtime.missing) == 3
    assert runtime.metrics.counts["background.dropped"] == 2
    busy = local.submit(tokens(30, 9), 300)
    turn(local, 250)
    assert runtime.metrics.counts["background.started"] == 0  # not while a request is running
    local.run(busy)
    turn(local, 900)
    assert runtime.metrics.counts["background.started"] == 3


def test_a_busy_engine_builds_within_its_share_one_at_a_time(engine, monkeypatch):
    local = engine("llama")
    runtime = local.runtime
    monkeypatch.setattr(runtime, "build_share", BuildShare(0.5))
    computed = []
    note = runtime.build_share.note_forward

    def watch(rows, build_rows):
        computed.append((rows, build_rows))
        note(rows, build_rows)

    monkeypatch.setattr(runtime.build_share, "note_forward", watch)
    many = [tokens(30, 700 + i) for i in range(6)]
    ids, spans = lay_out(many, tokens(5, 3))
    busy = [local.submit(tokens(30, 9 + i), 220) for i in range(2)]
    local.ask(ids, 1, fusion={"spans": spans})
    waiting = len(runtime.missing)
    assert waiting == 5
    local.run(*busy)
    assert runtime.metrics.counts["background.started"] >= 3  # no turn of the loop was idle
    built, owed = 0, 0.0
    for rows, build_rows in computed:
        assert (
            build_rows <= max(map(len, many)) + runtime.passage.size + PREFIX
        )  # one build per batch
        if build_rows:
            assert owed <= 0  # what the build before it cost was paid back
        owed += build_rows - (0.5 * max(rows - build_rows, 32) if rows > build_rows else 0)
        owed = max(owed, 0.0)
        built += build_rows
    assert built
    turn(local, 1200)
    assert not runtime.missing
    local.flush()
    second = local.ask(ids, 1, fusion={"spans": spans, "policy": "reuse"})
    assert report(second)["reused_tokens"] == sum(map(len, many))


def test_requests_beside_builds_get_the_same_answers(engine, monkeypatch):
    local = engine("llama")
    monkeypatch.setattr(local.runtime, "build_share", BuildShare(1.0))
    plain = local.ask(tokens(40, 21), 24, fusion={"mode": "off"})
    local.flush()
    ids, spans = lay_out([tokens(30, 800 + i) for i in range(5)], tokens(5, 3))
    busy = local.submit(tokens(40, 21), 24, fusion={"mode": "off"})
    missed = local.submit(ids, 1, fusion={"spans": spans})
    local.run(busy, missed)
    assert local.runtime.metrics.counts["background.started"]
    assert busy.output_ids == plain.output_ids
    local.settle()
    local.runtime.store.check_integrity(expect_idle=True)


def test_a_busy_engine_with_no_share_waits_for_idleness():
    share = BuildShare(0.0)
    share.note_forward(4000, 0)
    assert not share.may_start


def test_rows_of_builds_are_paid_back_by_rows_of_clients():
    share = BuildShare(0.1)
    assert share.may_start
    share.note_forward(350, 300)  # a build of 300 rows beside 50 of clients
    assert share.owed == pytest.approx(300 - 5)
    share.note_forward(300, 300)  # a batch of builds alone pays nothing
    assert share.owed == pytest.approx(595)
    share.note_forward(4, 0)  # a decode step counts as 32 rows
    assert share.owed == pytest.approx(595 - 3.2)
    share.note_forward(6000, 0)
    assert share.may_start
    assert share.owed == 0


def test_tenants_do_not_see_each_other(engine):
    local = engine("llama")
    local.build(PREFIX_IDS, CHUNKS[0], cache_salt="one")
    ids, spans = lay_out([tokens(5, 5), CHUNKS[0]], tokens(9, 3))
    spans = spans[2:]
    for fields, hit in [
        ({"cache_salt": "one"}, True),
        ({"cache_salt": "two"}, False),
        ({}, False),
        ({"extra_key": "one"}, False),
    ]:
        fusion = {"spans": spans, "prefix_len": PREFIX, "policy": "reuse"}
        req = local.ask(ids, 1, fusion=fusion, **fields)
        assert (report(req)["reused_tokens"] == CHUNK) is hit


def test_malformed_spans_that_reach_a_scheduler_are_served_as_usual(engine):
    local = engine("llama")
    plain = local.ask(tokens(40, 8), 4, fusion={"mode": "off"})
    local.flush()
    req = local.ask(tokens(40, 8), 4, fusion={"spans": [5, 400]})
    assert req.output_ids == plain.output_ids
    assert local.runtime.metrics.counts["fallbacks.malformed"] == 1


def test_requests_that_cannot_be_fused_say_why(engine):
    local = engine("llama")
    local.build(PREFIX_IDS, CHUNKS[0])
    ids, spans = lay_out([tokens(5, 5), CHUNKS[0]], tokens(9, 3))
    fusion = {"spans": spans[2:], "prefix_len": PREFIX, "policy": "reuse"}
    local.flush()
    req = local.ask(ids, 1, fusion=fusion, logprob_start_len=3)
    assert report(req)["fallback"] == "input_logprobs"
    assert report(req)["reused_tokens"] == 0
    assert len(req.logprob.input_token_logprobs_val) == len(ids) - 3
    local.flush()
    assert report(local.ask(ids, 1, fusion=fusion))["reused_tokens"] == CHUNK


def test_an_evicted_chunk_is_a_miss_and_wrong_bytes_are_never_asked_for(engine):
    local = engine("llama")
    local.build(PREFIX_IDS, CHUNKS[0])
    ids, spans = lay_out([tokens(5, 5), CHUNKS[0]], tokens(9, 3))
    local.runtime.store.clear()
    local.flush()
    fusion = {"spans": spans[2:], "prefix_len": PREFIX, "policy": "reuse"}
    before = local.runtime.store.stats().misses
    assert report(local.ask(ids, 1, fusion=fusion))["fallback"] == "miss"
    assert local.runtime.store.stats().misses == before + 1


def test_a_fault_while_matching_costs_speed_and_nothing_else(engine, monkeypatch):
    local = engine("llama")
    local.build(PREFIX_IDS, CHUNKS[0])
    local.flush()
    monkeypatch.setattr(local.runtime.store, "resolve", lambda *a, **k: 1 / 0)
    ids, spans = lay_out([CHUNKS[0]], tokens(9, 3))
    req = local.ask(ids, 2, fusion={"spans": spans})
    assert len(req.output_ids) == 2
    assert report(req)["fallback"] == "internal_error"
    assert local.runtime.metrics.counts["fallbacks.internal_error"] == 1


def test_a_fault_while_planning_is_ordinary_prefill_too(engine, monkeypatch):
    from rag_pipeline.sglang_plugin.fusion.forward import fused_forward

    local = engine("llama")
    local.build(PREFIX_IDS, CHUNKS[0])
    ids, spans = lay_out([tokens(5, 5), CHUNKS[0]], tokens(9, 3))
    fusion = {"spans": spans[2:], "prefix_len": PREFIX, "policy": "query:0.6"}
    local.flush()
    plain = local.ask(ids, 4, fusion={"mode": "off"})
    local.flush()
    monkeypatch.setattr(fused_forward, "make_view", lambda *a, **k: 1 / 0)
    req = local.ask(ids, 4, fusion=fusion)
    assert req.output_ids == plain.output_ids
    assert req.logprob.output_token_logprobs_val == plain.logprob.output_token_logprobs_val
    assert report(req)["fallback"] == "internal_error"
    assert (report(req)["reused_tokens"], report(req)["computed_fraction"]) == (0, 1.0)


def missing(local):
    prefix = local.runtime.prefix(np.array(PREFIX_IDS), PREFIX, RadixNamespace(None, None))
    ids = np.array(CHUNKS[1])
    return MissingChunk(prefix=prefix, ids=ids, key=ChunkKey.of(prefix.context, ids))


def test_server_info_shows_state_and_counters(engine):
    from sglang.srt.managers.io_struct import AbortReq

    local = engine("llama")
    local.build(PREFIX_IDS, CHUNKS[0])
    controller = next(
        v
        for v in vars(local.scheduler).values()
        if type(v).__name__ == "SchedulerInternalStateController"
    )
    block = controller.get_internal_state(None).internal_state["rag_fusion"]
    assert block["on"]
    assert block["self_check"].startswith("passed: rotation")
    assert block["store"]["chunks_now"] == 1
    assert block["counts"]["spans.stored"] == 1
    assert block["pending"] == 0
    # Builds that wait are counted, and one that is aborted in the queue leaves nothing behind.
    background.start(local.runtime, local.scheduler, missing(local))
    block = controller.get_internal_state(None).internal_state["rag_fusion"]
    assert block["pending"] == 1
    local.scheduler.abort_request(AbortReq(rid="rag-internal-"))
    block = controller.get_internal_state(None).internal_state["rag_fusion"]
    assert block["pending"] == 0
    assert all(info.state is ChunkState.READY for info in local.runtime.store.ls())


def test_metrics_reach_prometheus_once(engine, monkeypatch):
    from prometheus_client import REGISTRY

    from rag_pipeline.sglang_plugin.fusion.runtime.metrics import FusionMetrics

    metrics = FusionMetrics(export=True, labels={"model_name": "m"})
    metrics.count("tokens", "reused", 5)
    metrics.count("tokens", "reused", 2)
    metrics.observe("match_seconds", 0.003)
    metrics.gauge("store_bytes", 99)
    labels = {"model_name": "m"}
    assert REGISTRY.get_sample_value("rag_fusion:tokens_total", labels | {"kind": "reused"}) == 7
    assert REGISTRY.get_sample_value("rag_fusion:match_seconds_count", labels) == 1
    assert REGISTRY.get_sample_value("rag_fusion:store_bytes", labels) == 99
    assert metrics.to_json()["tokens.reused"] == 7


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"pp_size": 2}, "pipeline"),
        ({"enable_dp_attention": True}, "data-parallel attention"),
        ({"speculative_algorithm": "EAGLE"}, "speculative"),
        ({"disaggregation_mode": "prefill"}, "disaggregated"),
        ({"enable_hierarchical_cache": True}, "hierarchical"),
    ],
)
def test_settings_that_are_refused_name_their_reason(settings, word):
    from rag_pipeline.sglang_plugin.fusion.runtime.support import refuse_settings

    assert word in refuse_settings(SimpleNamespace(**settings))
    assert refuse_settings(SimpleNamespace()) is None
    assert refuse_settings(SimpleNamespace(speculative_algorithm="NGRAM")) is None


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "dynamic NTK",
        ),
    ],
)
def test_models_that_are_refused_are_served_without_fusion(engine, tiny_model, change, word):
    from rag_pipeline.sglang_plugin.fusion.runtime.model_facts import (
        UnsupportedModelError,
        read_model,
    )

    local = engine("llama")
    runner = local.scheduler.tp_worker.model_runner
    config = runner.model_config.hf_config
    kept = {name: getattr(config, name) for name in change}
    try:
        for name, value in change.items():
            setattr(config, name, value)
        with pytest.raises(UnsupportedModelError, match=word):
            read_model(runner, tp_rank=0, tp_size=1)
        config.architectures = ["DeepseekV3ForCausalLM"]
        with pytest.raises(UnsupportedModelError, match="not tested"):
            read_model(runner, tp_rank=0, tp_size=1)
    finally:
        config.architectures = ["LlamaForCausalLM"]
        for name, value in kept.items():
            setattr(config, name, value)
    assert read_model(runner, tp_rank=0, tp_size=1).fingerprint == local.runtime.facts.fingerprint
