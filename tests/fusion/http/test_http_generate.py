"""Fusion through SGLang's own ``/generate``: built, fused, left alone, streamed, counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rag_pipeline import EngineError, ServerBackend
from rag_pipeline.protocol import (
    FusionChoice,
    FusionRequest,
    GenerationRequest,
    SamplingOptions,
    fusion_report,
    usage_from_meta,
)
from rag_pipeline.sglang_plugin import activation_of
from rag_pipeline.types import Span

pytestmark = pytest.mark.engine


def test_server_info_shows_the_activation_and_reads_no_chunk_of_another_model(server, client: Any):
    facts = activation_of(server["url"])
    assert facts.active
    assert facts.unapplied == ()
    assert facts.attention_backend == "rag_cpu"
    assert (facts.fusion_on, facts.fusion_off_reason) == (True, "")
    assert facts.self_check.startswith("passed: rotation")
    state = client.state()
    assert state["on"]
    assert state["self_check"].startswith("passed: rotation")
    assert state["counts"]["disk.foreign"] == 1
    assert "disk.loaded" not in state["counts"]
    assert state["store"]["pinned_bytes_now"] == 0


def test_generate_builds_fuses_and_leaves_alone(client: Any, layout, built):
    assert [report["built_chunks"] for report in built] == [1, 1, 1]
    ids, spans = layout["ids"], layout["spans"]
    client.flush()
    off = client.generate(ids, FusionRequest(mode="off"))
    assert "rag_fusion" not in off["meta_info"]

    def facts(answer):
        return answer["output_ids"], [e[0] for e in answer["meta_info"]["output_token_logprobs"]]

    client.flush()
    full = client.generate(ids, FusionRequest(spans=spans, prefix_len=spans[0][0], policy="full"))
    report = full["meta_info"]["rag_fusion"]
    # The first chunk stands where it was computed: exact, so never recomputed.
    own = spans[0][1] - spans[0][0]
    assert report["reused_tokens"] == own
    assert report["recomputed_tokens"] == sum(end - start for start, end in spans) - own
    assert facts(full)[0] == facts(off)[0]
    assert facts(full)[1] == pytest.approx(facts(off)[1], abs=1e-3)
    client.flush()
    fusion = FusionRequest(
        spans=spans, prefix_len=spans[0][0], policy="query", ratio=0.5, passage=False
    )
    report = client.generate(ids, fusion)["meta_info"]["rag_fusion"]
    parts = [f"{part}_tokens" for part in ("exact_prefix", "reused", "recomputed", "fresh")]
    assert sum(report[part] for part in parts) == len(ids)
    assert report["reused_tokens"] > 0
    assert report["recomputed_tokens"] > 0
    assert (report["policy"], report["ratio"]) == ("query", 0.5)
    # Behind a fused request the exact one finds the system part and nothing else.
    again = client.generate(ids, FusionRequest(mode="off"))
    assert again["meta_info"]["cached_tokens"] <= layout["system"]
    assert facts(again)[0] == facts(off)[0]


def test_several_samples_and_a_batch_with_hints_for_each(client: Any, layout, built):
    ids, spans = layout["ids"], layout["spans"]
    fuse = FusionRequest(
        spans=spans, prefix_len=spans[0][0], policy="reuse", passage=False
    ).to_kv_hints()
    off = FusionRequest(mode="off").to_kv_hints()
    sampling = {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True}
    client.flush()
    pair = client.ok(
        "/generate",
        {"input_ids": [ids, ids], "sampling_params": sampling, "kv_hints": [fuse, off]},
    )
    assert pair[0]["meta_info"]["rag_fusion"]["reused_tokens"] == sum(e - s for s, e in spans)
    assert "rag_fusion" not in pair[1]["meta_info"]
    client.flush()
    twice = client.ok(
        "/generate",
        {"input_ids": ids, "sampling_params": sampling | {"n": 2}, "kv_hints": fuse},
    )
    assert len(twice) == 2
    assert twice[0]["output_ids"] == twice[1]["output_ids"]


def test_the_report_reaches_the_client_in_a_stream(client: Any, layout, built):
    ids, spans = layout["ids"], layout["spans"]
    client.flush()
    sampling = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
    fusion = FusionRequest(spans=spans, prefix_len=spans[0][0], policy="reuse", passage=False)
    body = {"input_ids": ids, "sampling_params": sampling, "kv_hints": fusion.to_kv_hints()}
    messages = client.stream("/generate", body | {"stream": True})
    reports = [fusion_report(message["meta_info"]) for message in messages]
    assert len(messages) > 1
    assert reports[-1] is not None
    assert reports[-1]["reused_tokens"] == sum(end - start for start, end in spans)
    assert all(report in (None, reports[-1]) for report in reports)


def test_the_server_backend_streams_text_and_usage(client: Any, model: Path, layout, built):
    backend = ServerBackend(client.url)
    backend.check_model(model)
    ids, spans = layout["ids"], layout["spans"]
    client.flush()
    request = GenerationRequest(
        input_ids=tuple(ids),
        sampling=SamplingOptions(max_new_tokens=6),
        fusion=FusionChoice(policy="epic", ratio=0.25).request(
            [Span(start=a, end=b) for a, b in spans]
        ),
    )
    pieces = list(backend.generate(request))
    usage = usage_from_meta(pieces[-1].meta_info, prompt_tokens=len(ids))
    assert usage.reused_tokens > 0
    assert usage.recomputed_tokens > 0
    assert usage.fresh_tokens >= len(ids) - spans[-1][1]
    beyond = FusionChoice(policy="reuse").request((Span(start=4, end=99),))
    bad = GenerationRequest(input_ids=tuple(ids[:9]), fusion=beyond)
    with pytest.raises(
        EngineError, match=r"fusion span \(4, 99\) in a prompt of 9 tokens"
    ) as caught:
        list(backend.generate(bad))
    assert "\n" not in str(caught.value)
    backend.close()


def test_metrics_show_counters_and_histograms_moving(client: Any, layout, built):
    before = client.metrics()
    client.flush()
    spans = layout["spans"]
    fusion = FusionRequest(
        spans=spans, prefix_len=spans[0][0], policy="query", ratio=0.5, passage=False
    )
    report = client.generate(layout["ids"], fusion)["meta_info"]["rag_fusion"]
    missing = FusionRequest(spans=((4, 40),), prefix_len=4, policy="reuse", passage=False)
    client.generate(list(range(2, 60)), missing)
    moved = client.moved(before)
    for part in ("reused", "recomputed"):
        assert (
            moved[f"tokens.{part}_total" if f"tokens.{part}_total" in moved else f"tokens.{part}"]
            == report[f"{part}_tokens"]
        )
    assert moved["requests.fused"] == 1
    assert moved["fallbacks.miss"] == 1
    assert moved["match_seconds_count"] == 2
    for name in ("plan_seconds", "probe_seconds", "forward_seconds"):
        assert moved[f"{name}_count"] == 1
        assert moved[f"{name}_sum"] > 0
    assert client.metrics()["store_chunks"] == client.state()["store"]["chunks_now"]
