"""Families beside plain decoders, each on one engine: experts, sliding windows, caps on logits, two rotations."""

from __future__ import annotations

import logging

import pytest
import torch
from fusion_helpers import CHUNKS, PREFIX_IDS, largest_difference, lay_out, logprobs, report, tokens

from rag_pipeline.sglang_plugin.fusion.self_check.check import run_self_check

FAMILIES = ("gemma2", "gemma3", "mixtral", "qwen3_moe", "deepseek_v2")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_served_and_fused_as_its_definition_says(engine, tiny_model, caplog, family):
    from transformers import AutoModelForCausalLM

    local = engine(family)
    assert local.runtime.is_on, local.runtime.off_reason
    assert max(run_self_check(local.runtime, local.scheduler).values()) < 1e-3
    for chunk in CHUNKS:
        local.build(PREFIX_IDS, chunk)
    ids, spans = lay_out(CHUNKS[::-1], tokens(9, 2))
    local.flush()
    plain = local.ask(ids, fusion={"mode": "off"})
    # What the family is, by transformers, which shares no line with SGLang or this project.
    truth = AutoModelForCausalLM.from_pretrained(
        tiny_model(family), dtype=torch.float32, attn_implementation="eager"
    )
    with torch.inference_mode():
        logits = truth(torch.tensor([ids + list(plain.output_ids)[:-1]])).logits[0]
    wanted = logits[len(ids) - 1 :].log_softmax(-1)
    at = torch.arange(len(plain.output_ids))
    torch.testing.assert_close(
        torch.tensor(logprobs(plain)), wanted[at, list(plain.output_ids)], rtol=0, atol=1e-3
    )
    for policy in ("full", "query:1.0", "cacheblend:1.0"):
        local.flush()
        fused = local.ask(ids, fusion={"spans": spans, "policy": policy})
        assert report(fused)["fallback"] == ""
        assert report(fused)["recomputed_tokens"] == 120
        assert largest_difference(plain, fused) < 5e-4
    local.flush()
    reused = local.ask(ids, fusion={"spans": spans, "policy": "query:0.3"})
    assert report(reused)["reused_tokens"] > 0
    assert report(reused)["recomputed_tokens"] > 0
    assert abs(logprobs(reused)[0] - logprobs(plain)[0]) > 1e-3  # what is compared above can differ
    sparse = attention_of(local, ids, "streaming:block=16+window=2")
    assert abs(logprobs(sparse)[0] - logprobs(plain)[0]) > 1e-3
    # All blocks: the same rows, windows and caps by another way.
    everything = attention_of(local, ids, "streaming:block=16+window=64")
    assert largest_difference(plain, everything) < 5e-4
    # SALE weighs keys by logits, so a cap is one line and dense attention.
    with caplog.at_level(logging.WARNING, "rag_pipeline.sglang_plugin"):
        weighed = attention_of(local, ids, "sale:min_tokens=64")
    assert ("caps at 5" in caplog.text) == (family == "gemma2")
    assert report(weighed)["fallback"] == ""


def attention_of(local, ids, method):
    """Answer of a prompt by an attention method, from an empty tree."""
    local.flush()
    return local.ask(ids, fusion={"attention": method})


def test_a_model_that_writes_its_keys_while_it_rotates_them_is_neither_written_twice_nor_left_out(
    engine, monkeypatch
):
    """On CUDA Qwen3-MoE and gpt-oss call their attention with ``save_kv_cache=False``."""
    from sglang.srt.models import qwen3_moe

    local = engine("qwen3_moe")
    for chunk in CHUNKS:
        local.build(PREFIX_IDS, chunk)
    ids, spans = lay_out(CHUNKS[::-1], tokens(9, 2))

    def answers():
        found = []
        for policy in ("off", "full", "reuse", "query:0.6", "cacheblend:0.6"):
            local.flush()
            given = {"mode": "off"} if policy == "off" else {"spans": spans, "policy": policy}
            req = local.ask(ids, fusion=given)
            assert policy == "off" or report(req)["fallback"] == ""
            found.append((list(req.output_ids), logprobs(req)))
        return found

    wanted, written = answers(), []
    rotary = local.scheduler.tp_worker.model_runner.model.model.layers[0].self_attn.rotary_emb
    original = rotary.forward

    def rotate_and_store(positions, query, key, offsets=None, fused_set_kv_buffer_arg=None):
        """What the CUDA kernel does, in torch."""
        query, key = original(positions, query, key, offsets)
        where = fused_set_kv_buffer_arg
        where.k_buffer[where.cache_loc] = key.flatten(1)
        where.v_buffer[where.cache_loc] = where.value.flatten(1)
        written.append(int(where.cache_loc.max()))
        return query, key

    monkeypatch.setattr(rotary, "forward", rotate_and_store)
    monkeypatch.setattr(qwen3_moe, "enable_fused_set_kv_buffer", lambda batch: True)
    assert answers() == wanted
    assert 0 in written  # fused batches wrote the padding slot
    assert max(written) > 0  # and others their own
