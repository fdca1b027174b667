"""Approximation only when asked for: who asks, who may be matched unasked, and who never is."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
from fusion_helpers import PREFIX, PREFIX_IDS, store_chunks, tokens

from rag_pipeline.protocol import FusionRequest
from rag_pipeline.sglang_plugin.fusion.config import FusionConfig
from rag_pipeline.sglang_plugin.fusion.request.consent import (
    may_unasked,
    refuse_asked,
    refuse_engine,
)

CHUNK = 80
SILENT = {"return_logprob": False, "top": 0}


CHUNKS = [tokens(CHUNK, 10 + i) for i in range(3)]
PROMPT = [*PREFIX_IDS, *CHUNKS[2], *tokens(11, 5), *CHUNKS[0], *tokens(9, 3)]


def req(**fields):
    """A request of SGLang that asks for new tokens and nothing else."""
    new = fields.pop("new", 5)
    silent = dict.fromkeys(
        (
            "return_logprob",
            "return_hidden_states",
            "return_routed_experts",
            "return_indexer_topk",
            "return_sampling_mask",
        ),
        False,
    )
    pooling = {"multi_item_delimiter_indices": None, "token_indices_to_pool": None}
    params = SimpleNamespace(max_new_tokens=new)
    return SimpleNamespace(
        **{"cache_salt": None, "sampling_params": params, **silent, **pooling, **fields}
    )


ON = FusionConfig(automatic=True)


def test_nothing_is_matched_unasked_unless_the_operator_says_so():
    assert may_unasked(FusionConfig(), req()) == (False, False)
    assert may_unasked(ON, req()) == (True, False)
    acme = FusionConfig(automatic_tenants=("tenant-1",))
    seen = {
        salt: may_unasked(acme, req(cache_salt=salt)).matching
        for salt in ("tenant-1", "tenant-1/own", "tenant-11", "tenant-2/tenant-1", None)
    }
    assert [salt for salt, matched in seen.items() if matched] == ["tenant-1", "tenant-1/own"]


@pytest.mark.parametrize(
    "fields",
    [
        {"return_logprob": True},
        {"return_hidden_states": True},
        {"return_routed_experts": True},
        {"return_indexer_topk": True},
        {"return_sampling_mask": True},
        {"new": 0},
        {"multi_item_delimiter_indices": [3]},
        {"token_indices_to_pool": [3]},
    ],
)
def test_a_request_for_numbers_is_never_matched_unasked(fields):
    config = dataclasses.replace(ON, attention="power")
    assert may_unasked(config, req()) == (True, True)
    assert may_unasked(config, req(**fields)) == (False, False)


def test_what_asks_is_refused_only_where_it_only_scores():
    asks = FusionRequest(spans=((0, 4),), policy="query")
    assert refuse_asked(asks, req(return_logprob=True)) is None
    assert refuse_asked(asks, req(new=0, return_logprob=True)) == "scoring"
    assert refuse_asked(asks, req(token_indices_to_pool=[1])) == "scoring"
    assert refuse_asked(FusionRequest(mode="build"), req(new=0)) is None


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({}, None),
        ({"enable_deterministic_inference": False, "rl_on_policy_target": None}, None),
        ({"enable_deterministic_inference": True}, "--enable-deterministic-inference"),
        ({"rl_on_policy_target": "fsdp"}, "--rl-on-policy-target"),
    ],
)
def test_a_deterministic_engine_approximates_nothing(fields, named):
    from sglang.srt.server_args import ServerArgs

    reason = refuse_engine(ServerArgs(model_path="none", **fields))
    assert (reason is None) if named is None else (named in reason)


# -- in the scheduler ------------------------------------------------------------------------------


def report_if_any(found):
    return (found.customized_info or {}).get("rag_fusion", [None])[0]


@pytest.fixture
def local(engine, monkeypatch):
    """An engine with stored chunks and automatic matching on."""
    made = engine("llama")
    store_chunks(made, CHUNKS)
    config = dataclasses.replace(made.runtime.config, automatic=True)
    monkeypatch.setattr(made.runtime, "config", config)
    return made


def test_prompts_are_matched_unasked_where_it_is_switched_on_and_as_shipped_they_are_not(
    local, monkeypatch
):
    found = local.ask(PROMPT, 4, **SILENT)
    assert report_if_any(found)["policy"] == "query"
    assert (
        report_if_any(found)["reused_tokens"] + report_if_any(found)["recomputed_tokens"]
        == 2 * CHUNK
    )
    # Another prefix: chunk KV computed behind ours is not valid there.
    local.flush()
    other = [*tokens(PREFIX, 99), *CHUNKS[2], *tokens(9, 3)]
    assert report_if_any(local.ask(other, 4, **SILENT)) is None
    monkeypatch.setattr(local.runtime, "config", FusionConfig())
    local.flush()
    assert report_if_any(local.ask(PROMPT, 4, **SILENT)) is None
    # A client that has no spans may still ask.
    local.flush()
    asked = report_if_any(local.ask(PROMPT, 4, fusion={"policy": "reuse"}))
    assert asked["reused_tokens"] == 2 * CHUNK


@pytest.mark.parametrize(
    ("new", "fields"),
    [
        (4, {}),  # log-probabilities of the new tokens
        (4, {"logprob_start_len": 0}),  # and of the prompt
        (0, {"token_ids_logprob": [3, 7]}),  # as /v1/score asks
    ],
)
def test_log_probabilities_are_those_of_plain_prefill_unless_fusion_is_asked_for(
    local, new, fields
):
    plain = local.ask(PROMPT, new, fusion={"mode": "off"}, **fields)
    local.flush()
    unasked = local.ask(PROMPT, new, **fields)
    assert report_if_any(unasked) is None
    for name in (
        "output_token_logprobs_val",
        "output_token_ids_logprobs_val",
        "input_token_logprobs_val",
    ):
        assert getattr(unasked.logprob, name) == getattr(plain.logprob, name)
    local.flush()
    spans = [PREFIX, PREFIX + CHUNK]
    asked = local.ask(PROMPT, new, fusion={"spans": spans, "policy": "reuse"}, **fields)
    fallback = {(4, 0): "", (4, 1): "input_logprobs", (0, 1): "scoring"}[new, len(fields)]
    assert report_if_any(asked)["fallback"] == fallback
    assert report_if_any(asked)["reused_tokens"] == (0 if fallback else CHUNK)


@pytest.mark.parametrize("length", [0, 1, 15])
def test_a_prefix_that_begins_every_prompt_is_found_by_nobody_else(local, length):
    head = PREFIX_IDS[:length]
    local.build(head, tokens(80, 33))
    local.flush()
    stranger = [*head, *tokens(30, 34), *tokens(80, 33), *tokens(9, 3)]
    assert report_if_any(local.ask(stranger, 4, **SILENT)) is None
    # Whoever names that prefix has the chunk all the same.
    local.flush()
    spans = [length + 30, length + 110]
    fusion = {"spans": spans, "prefix_len": length, "policy": "reuse"}
    assert report_if_any(local.ask(stranger, 4, fusion=fusion))["reused_tokens"] == 80


def test_a_prompt_with_spans_is_scanned_only_where_one_of_them_is_missing(local, monkeypatch):
    monkeypatch.setattr(local.runtime, "config", FusionConfig())

    def ask(*spans):
        local.flush()
        before = local.runtime.store.stats().prompts_matched
        fusion = {"spans": [p for span in spans for p in span], "policy": "reuse"}
        asked = report_if_any(local.ask(PROMPT, 1, fusion=fusion))
        return asked["reused_tokens"], local.runtime.store.stats().prompts_matched - before

    first = (PREFIX, PREFIX + CHUNK)
    second = (first[1] + 11, first[1] + 11 + CHUNK)
    assert ask(first, second) == (2 * CHUNK, 0)
    # Cut otherwise than what is stored: the part that the stored chunk covers is served, nothing outside the span.
    reused, scans = ask(first, (second[0] - 5, second[1] - 8))
    assert reused == 2 * CHUNK - 8
    assert scans > 0
