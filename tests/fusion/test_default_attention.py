"""A server with a default attention method, in the real engine: its radix namespace, and what dense requests see of it."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
from fusion_helpers import VOCAB, agree, attribute, chunk_limit, logprobs, report, tokens

POWER = "power:block=8+window=2"
REPORTED = {"mode": "fuse"}
SHARED = tokens(150, 12)
FIRST, SECOND = [*SHARED, *tokens(30, 13)], [*SHARED, *tokens(41, 14)]
BY_POWER, DENSE = {"attention": POWER}, {"attention": "dense"}


def default(local, method):
    """Have the engine another default method, for a while."""
    runtime = local.runtime
    return attribute(runtime, "config", dataclasses.replace(runtime.config, attention=method))


def pieces_of(local, rows):
    return chunk_limit(local, rows) if rows else contextlib.nullcontext()


@pytest.mark.parametrize("piece", [0, 48])
def test_a_prefix_of_the_method_is_found_again_and_is_what_it_would_compute(engine, piece):
    local = engine("llama")
    with pieces_of(local, piece):
        fresh = local.ask(SECOND, 4, fusion=BY_POWER)
        local.flush()
        stock = local.ask(SECOND, 4)
        local.flush()
        local.ask(FIRST, 4, fusion=BY_POWER)
        second = local.ask(SECOND, 4, fusion=BY_POWER)
        assert second.cached_tokens == len(SHARED)
        assert report(second)["exact_prefix_tokens"] == len(SHARED)
        assert report(second)["attention"] == POWER
        agree(second, fresh, 1e-4)
        # Nobody else gets any of it, and what others compute is as ever.
        for fusion in (None, DENSE, {"attention": f"{POWER}+sink=2"}):
            other = local.ask(SECOND, 4, fusion=fusion, cache_salt=None)
            assert other.cached_tokens == (len(SECOND) - 1 if fusion == DENSE else 0)
            if fusion in (None, DENSE):
                assert other.output_ids == stock.output_ids
                assert logprobs(other) == pytest.approx(logprobs(stock), abs=1e-4)
        assert max(abs(a - b) for a, b in zip(logprobs(stock), logprobs(fresh), strict=True)) > 1e-3
        stranger = local.ask(SECOND, 4, fusion=BY_POWER, cache_salt="globex")
        assert stranger.cached_tokens == 0
        again = local.ask(SECOND, 4, fusion=BY_POWER)
        assert again.cached_tokens == len(SECOND) - 1
        agree(again, fresh, 1e-4)


def test_the_next_turn_finds_the_answer_that_the_method_decoded(engine):
    local = engine("llama")
    answered = local.ask(FIRST, 9, fusion=BY_POWER)
    turn = [*FIRST, *answered.output_ids, *tokens(7, 3)]
    second = local.ask(turn, 4, fusion=BY_POWER)
    assert second.cached_tokens == len(FIRST) + 8  # the last token of an answer has no KV
    local.flush()
    agree(second, local.ask(turn, 4, fusion=BY_POWER), 1e-4)


@pytest.mark.parametrize(("piece", "most"), [(0, 176), (64, 176), (56, 96)])
def test_where_rows_choose_by_blocks_pages_and_pieces_end_where_they_do(engine, piece, most):
    """The method decodes densely: of an answer nothing is found. Behind a piece that ends elsewhere neither."""
    local = engine("llama", page_size=16)
    method = {"attention": "block_topk:block=16+blocks=3"}
    fresh = local.ask(SECOND, 4, fusion=method)
    local.flush()
    with pieces_of(local, piece):
        answered = local.ask(FIRST, 40, fusion=method)
        turn = [*FIRST, *answered.output_ids, 5]
        assert local.ask(turn, 1, fusion=method).cached_tokens == most
        second = local.ask(SECOND, 4, fusion=method)
    assert second.cached_tokens == len(SHARED) // 16 * 16
    agree(second, fresh, 1e-4)


@pytest.mark.parametrize("settings", [{}, {"page_size": 16}], ids=["page 1", "page 16"])
def test_sale_shares_whole_blocks_of_rows_whatever_the_page(engine, settings):
    local = engine("llama", **settings)
    options = "block_q=16+block_k=8+local_window=32+segment=32+min_tokens=64"
    sale = {"attention": f"sale:thresholds=0.03+{options}"}
    fresh = local.ask(SECOND, 4, fusion=sale)
    local.flush()
    first = local.ask(FIRST, 4, fusion=sale)
    again = local.ask(FIRST, 4, fusion=sale)
    assert again.cached_tokens == len(FIRST) // 16 * 16 < len(FIRST) - 1
    assert report(again)["exact_prefix_tokens"] == again.cached_tokens
    agree(again, first, 1e-4)
    second = local.ask(SECOND, 4, fusion=sale)
    assert second.cached_tokens == len(SHARED) // 16 * 16 < len(SHARED)
    agree(second, fresh, 1e-4)
    for other in ({"attention": f"sale:thresholds={tau}+{options}"} for tau in (0, "inf")):
        read = local.ask(SECOND, 4, fusion=other)  # everything, or nothing but what is always read
        off = [abs(a - b) for a, b in zip(logprobs(read), logprobs(fresh), strict=True)]
        assert max(off) > 1e-4


def test_retracted_requests_of_a_method_end_as_if_they_had_not_been(engine, monkeypatch):
    from sglang.srt.managers import scheduler as module

    local = engine("llama")
    prompts = [[*SHARED, *tokens(20 + i, 40 + i)] for i in range(3)]
    alone = []
    for ids in prompts:
        local.flush()
        alone.append(local.ask(ids, 12, fusion=BY_POWER))
    local.flush()
    monkeypatch.setattr(module, "TEST_RETRACT", True)
    monkeypatch.setattr(module, "TEST_RETRACT_INTERVAL", 3)
    reqs = [local.submit(ids, 12, fusion=BY_POWER) for ids in prompts]
    local.run(*reqs)
    assert any(req.retraction_count for req in reqs)
    monkeypatch.setattr(module, "TEST_RETRACT", False)
    for req, one in zip(reqs, alone, strict=True):
        assert req.output_ids == one.output_ids
    for ids, one in zip(prompts, alone, strict=True):
        agree(local.ask(ids, 12, fusion=BY_POWER), one, 1e-4)
    assert local.ask(prompts[0], 1, fusion=REPORTED).cached_tokens == 0


# -- the default --------------------------------------------------------------------------------


def test_plain_requests_get_the_default_and_their_own_choice_wins(engine):
    local = engine("llama")
    named = local.ask(FIRST, 5, fusion=BY_POWER)
    local.flush()
    dense = local.ask(FIRST, 5)
    local.flush()
    with default(local, POWER):
        plain = local.ask(FIRST, 5, return_logprob=False)
        assert report(plain)["attention"] == POWER
        assert plain.output_ids == named.output_ids
        second = local.ask(SECOND, 1, return_logprob=False)
        assert second.cached_tokens == len(SHARED)
        for fusion in (DENSE, {"mode": "off"}):
            own = local.ask(FIRST, 5, fusion=fusion, return_logprob=False)
            assert own.output_ids == dense.output_ids
        assert own.cached_tokens == len(FIRST) - 1
        # Log-probabilities are compared with others': they are the model's own.
        assert logprobs(local.ask(FIRST, 5)) == pytest.approx(logprobs(dense), abs=1e-4)
    assert local.runtime.metrics.counts["fallbacks.internal_error"] == 0


def test_unset_no_pass_of_fusions_own_computes_a_plain_request(engine, monkeypatch):
    from rag_pipeline.sglang_plugin.fusion.forward import model_forward

    def refused(*args):
        raise AssertionError("a fused forward")

    monkeypatch.setattr(model_forward, "FusedForward", refused)
    local = engine("llama")
    req = local.ask([t % VOCAB for t in FIRST], 3, return_logprob=False)
    assert req.customized_info is None
    assert not hasattr(req, "rag_fusion")
    assert req.extra_key is None
