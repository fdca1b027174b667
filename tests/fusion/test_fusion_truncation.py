"""A conversation whose oldest turns are cut goes on with the KV of those that stay, in the real engine.

Two ways to the same prompt are compared: the turns that stay are loaded from the store, their keys rotated to where
they stand now; and everything is prefilled. Layer 0 depends on the tokens and their positions alone, so it must be
the same; behind it the loaded KV still holds something of the turns that were cut.
"""

from __future__ import annotations

import pytest
import torch
from fusion_helpers import PREFIX, PREFIX_IDS, report, tokens

from rag_pipeline.sglang_plugin.fusion.conversations.cached_attention import CachedAttentionMemory

ANSWER = 6
USER = 30
CHAT = {"policy": "reuse", "conversation": "c", "prefix_len": PREFIX}


@pytest.fixture
def local(engine, monkeypatch):
    made = engine("llama")
    monkeypatch.setattr(made.runtime, "conversations", CachedAttentionMemory(made.runtime))
    return made


def talk(local, turns, fusion=CHAT, seed=100, **more):
    """Have a conversation of so many turns; returns the tokens of each turn with its answer, and the last request."""
    said, req = [], None
    for turn in range(turns):
        asked = tokens(USER, seed + turn)
        prompt = [*PREFIX_IDS, *(t for one in said for t in one), *asked]
        req = local.ask(prompt, ANSWER, fusion=fusion, **more)
        said.append([*asked, *req.output_ids])
    return said, req


def cut_prompt(said, kept, seed=900, asked=USER):
    return [*PREFIX_IDS, *(t for one in said[-kept:] for t in one), *tokens(asked, seed)]


def layer_kv(local, ids, layer, new=ANSWER, **fields):
    """KV of a prompt's positions in a layer, as it lies in the pool when the prompt is computed."""
    req = local.submit(ids, new, **fields)
    while not req.output_ids:
        local.step()
    pool = local.scheduler.token_to_kv_pool_allocator.get_kvcache()
    slots = local.scheduler.req_to_token_pool.req_to_token[req.kv.req_pool_idx][: len(ids)].long()
    kv = pool.get_key_buffer(layer)[slots].clone(), pool.get_value_buffer(layer)[slots].clone()
    local.run(req)
    return kv, req


def test_layer_0_of_the_turns_that_stay_equals_recomputation(local):
    said, _ = talk(local, 4)
    prompt = cut_prompt(said, 2)
    local.flush()
    loaded, req = layer_kv(local, prompt, 0, fusion=CHAT)
    mine = report(req)
    left = 2 * (USER + ANSWER) - 1  # the last answer token was never fed to the model
    assert mine["moved_tokens"] == mine["conversation_tokens"] == left
    assert mine["reused_tokens"] == left
    assert mine["recomputed_tokens"] == 0
    assert mine["fresh_tokens"] + mine["exact_prefix_tokens"] == len(prompt) - left
    local.flush()
    plain, _ = layer_kv(local, prompt, 0, fusion={"mode": "off"})
    for one, two in zip(loaded, plain, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)
    # Further up the two differ: the loaded KV saw the turns that were cut.
    local.flush()
    local.fresh()
    said_again, _ = talk(local, 4)
    assert said_again == said
    local.flush()
    deep, _ = layer_kv(local, prompt, 4, fusion=CHAT)
    local.flush()
    plain_deep, _ = layer_kv(local, prompt, 4, fusion={"mode": "off"})
    assert float((deep[1] - plain_deep[1]).abs().max()) > 1e-3


def test_moved_turns_are_approximate_and_never_enter_the_radix_tree(local):
    said, _ = talk(local, 4)
    prompt = cut_prompt(said, 2)
    local.flush()
    alone = local.ask(prompt, ANSWER, fusion={"mode": "off"})
    local.flush()
    cut = local.ask(prompt, ANSWER, fusion=CHAT)
    assert report(cut)["moved_tokens"] > 0
    after = local.ask(prompt, ANSWER, fusion={"mode": "off"})
    assert after.cached_tokens <= PREFIX
    assert list(after.output_ids) == list(alone.output_ids)
    torch.testing.assert_close(
        torch.tensor(after.logprob.output_token_logprobs_val),
        torch.tensor(alone.logprob.output_token_logprobs_val),
        rtol=0,
        atol=1e-4,
    )


def test_what_follows_a_cut_stands_in_place_and_can_be_cut_again(local):
    said, _ = talk(local, 4)
    prompt = cut_prompt(said, 2)
    local.flush()
    cut = local.ask(prompt, ANSWER, fusion=CHAT)
    assert report(cut)["moved_tokens"] > 0
    # One record holds all that is left, and those from before the cut are gone.
    assert len(local.runtime.store) == 1
    local.flush()
    following = [*prompt, *cut.output_ids, *tokens(USER, 901)]
    second = local.ask(following, ANSWER, fusion=CHAT)
    mine = report(second)
    assert mine["conversation_tokens"] == len(prompt) + ANSWER - 1 - PREFIX
    assert "moved_tokens" not in mine
    local.flush()
    last = following[len(prompt) - USER :]
    again = local.ask([*PREFIX_IDS, *last, *second.output_ids, 7, 8], ANSWER, fusion=CHAT)
    assert report(again)["moved_tokens"] == len(last) + ANSWER - 1
    local.flush()
    local.runtime.store.check_integrity(expect_idle=True)


def test_exact_turns_are_loaded_after_the_pool_dropped_them_and_say_the_same(local):
    said, _ = talk(local, 3)
    assert local.runtime.metrics.counts["turns.stored"] == 3
    following = [*PREFIX_IDS, *(t for one in said for t in one), *tokens(USER, 500)]
    local.flush()
    plain = local.ask(following, ANSWER, fusion={"mode": "off"})
    local.flush()
    loaded = local.ask(following, ANSWER, fusion=CHAT)
    assert report(loaded)["conversation_tokens"] == 3 * (USER + ANSWER) - 1
    assert list(loaded.output_ids) == list(plain.output_ids)
    torch.testing.assert_close(
        torch.tensor(loaded.logprob.output_token_logprobs_val),
        torch.tensor(plain.logprob.output_token_logprobs_val),
        rtol=0,
        atol=5e-4,
    )


def test_nobody_else_finds_moved_turns(local):
    said, _ = talk(local, 4, cache_salt="one")
    prompt = cut_prompt(said, 2)
    for fusion, more in (
        (CHAT, {"cache_salt": "two"}),
        (CHAT, {}),
        (CHAT | {"conversation": "d"}, {"cache_salt": "one"}),
        (CHAT | {"policy": "epic:0.3"}, {"cache_salt": "one"}),
    ):
        local.flush()
        req = local.ask(prompt, 2, fusion=fusion, **more)
        assert report(req)["conversation_tokens"] == 0
    local.flush()
    # Another system part: what was computed behind this one is of no use there.
    other = [*tokens(PREFIX, 77), *prompt[PREFIX:]]
    req = local.ask(other, 2, fusion=CHAT, cache_salt="one")
    assert report(req)["conversation_tokens"] == 0
    local.flush()
    req = local.ask(prompt, 2, fusion=CHAT, cache_salt="one")
    assert report(req)["moved_tokens"] > 0


def test_an_evicted_turn_ends_what_is_moved_and_answers_stay_right(local):
    said, _ = talk(local, 4)
    memory, store = local.runtime.conversations, local.runtime.store
    (turns,) = memory.table._spaces.of("")
    assert store.evict(turns[3].key)
    prompt = cut_prompt(said, 2)
    local.flush()
    req = local.ask(prompt, 2, fusion=CHAT)
    assert (
        report(req)["moved_tokens"] == USER + ANSWER - 1
    )  # the last token of a turn is of the next
    local.flush()
    store.check_integrity(expect_idle=True)
