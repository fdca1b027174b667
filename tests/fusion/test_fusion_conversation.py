"""Turns of a conversation reuse what earlier ones computed; nobody else ever sees it."""

from __future__ import annotations

import pytest
from fusion_helpers import (
    CHUNK,
    CHUNKS,
    PREFIX,
    agree,
    enter_prefix,
    lay_out,
    report,
    store_chunks,
    tokens,
)

ANSWER = 6


FIRST, SECOND, THIRD = tokens(9, 3), tokens(18, 4), tokens(17, 5)


IDS, SPANS = lay_out(
    CHUNKS[:0:-1], FIRST
)  # three chunks, none of them in its own place but the first


def parts(req):
    mine = report(req)
    kinds = ("exact_prefix_tokens", "reused_tokens", "recomputed_tokens", "fresh_tokens")
    assert sum(mine[k] for k in kinds) == mine["prompt_tokens"]
    return tuple(mine[k] for k in kinds)


def stored(local):
    store_chunks(local, CHUNKS)
    enter_prefix(local)
    return local


def fields(conversation="c", policy="epic:0.3", spans=SPANS):
    return {"spans": spans, "policy": policy} | (
        {"conversation": conversation} if conversation else {}
    )


def say(local, ids, fusion, **more):
    return local.ask(ids, ANSWER, fusion=fusion, **more)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"page_size": 16, "disable_overlap_schedule": False},
        {"family": "deepseek_v2"},
    ],
    ids=["page 1", "page 16 and overlap", "latents"],
)
def test_the_second_turn_loads_the_first_and_says_the_same(engine, settings):
    local = stored(engine(**({"family": "llama"} | settings)))
    exact = PREFIX // settings.get("page_size", 1) * settings.get("page_size", 1)
    # EPIC chooses the same rows whatever comes behind: turn two without the conversation is the oracle.
    plain_one = say(local, IDS, fields(""))
    turn = [*IDS, *plain_one.output_ids, *SECOND]
    plain_two = say(local, turn, fields(""))
    assert report(plain_two)["conversation_tokens"] == 0
    assert local.runtime.metrics.counts["turns.stored"] == 0

    one = say(local, IDS, fields())
    assert list(one.output_ids) == list(plain_one.output_ids)
    assert report(one)["conversation_tokens"] == 0
    two = say(local, turn, fields())
    agree(plain_two, two)
    left = len(IDS) + ANSWER - 1 - PREFIX  # the last answer token was never fed to the model
    assert report(two)["conversation_tokens"] == left
    assert parts(two) == (exact, left, 0, PREFIX - exact + 1 + len(SECOND))
    assert two.cached_tokens == exact

    # And the third loads both, the second's part on top of the first's.
    turn = [*turn, *two.output_ids, *THIRD]
    plain_three = say(local, turn, fields(""))
    three = say(local, turn, fields())
    agree(plain_three, three)
    assert parts(three)[1:3] == (len(turn) - len(THIRD) - 1 - PREFIX, 0)
    assert local.runtime.metrics.counts["turns.stored"] == 3


def test_exact_requests_equal_those_of_an_engine_that_never_fused(engine):
    local = engine("llama")
    answer = tokens(ANSWER, 8)
    turn = [*IDS, *answer, *SECOND]
    order = (IDS, turn, IDS, turn)
    stock = [say(local, ids, {"mode": "off"}) for ids in order]
    local.fresh()
    local = stored(local)
    local.flush()
    seen = []
    for at, ids in enumerate(order):
        seen.append(say(local, ids, {"mode": "off"}))
        if at == 0:
            # Other text behind the same chunks, so that they are fused and not found in the tree.
            other = [*IDS[:PREFIX], 7, *IDS[PREFIX:]]
            spans = [edge + 1 for edge in SPANS]
            fusion = fields(spans=spans) | {"prefix_len": PREFIX}
            first = say(local, other, fusion)
            assert report(first)["reused_tokens"] > 0
            second = say(local, [*other, *first.output_ids, *SECOND], fusion)
            assert report(second)["conversation_tokens"] > 0
    for one, two in zip(stock, seen, strict=True):
        assert list(one.output_ids) == list(two.output_ids)
        assert one.logprob.output_token_logprobs_val == two.logprob.output_token_logprobs_val
        assert one.cached_tokens == two.cached_tokens
    # The same text, the conversation first: exact requests find the exact prefix and no more.
    local.flush()
    alone = say(local, turn, {"mode": "off"})
    local.flush()
    first = say(local, IDS, fields())
    second = say(local, [*IDS, *first.output_ids, *SECOND], fields())
    assert report(second)["conversation_tokens"] > 0
    after = say(local, turn, {"mode": "off"})
    assert after.cached_tokens == PREFIX
    agree(alone, after, 1e-4)
    # Automatic matching would find a run as long as a turn; a turn is in no namespace that it looks into.
    local.flush()
    assert local.ask(turn, 1).customized_info is None


def test_other_names_tenants_ratios_and_policies_do_not_match(engine):
    local = stored(engine("llama"))
    one = say(local, IDS, fields())
    turn = [*IDS, *one.output_ids, *SECOND]
    others = [
        (fields("d"), {}),
        (fields(""), {}),
        (fields(policy="epic:0.31"), {}),
        (fields(policy="reuse"), {}),
        (fields() | {"policy": "epic", "ratio": 0.3, "options": {"first_tokens": 12}}, {}),
        (fields(), {"cache_salt": "other"}),
        (fields(), {"extra_key": "other"}),
    ]
    for fusion, more in others:
        req = say(local, turn, fusion, **more)
        assert report(req)["conversation_tokens"] == 0
    assert report(say(local, turn, fields()))["conversation_tokens"] > 0
    # The same policy in other words is the same policy.
    same = say(local, turn, fields() | {"policy": "epic", "ratio": 0.3})
    assert report(same)["conversation_tokens"] > 0


def test_other_words_in_the_answer_are_used_as_far_as_they_agree(engine):
    local = stored(engine("llama"))
    one = say(local, IDS, fields())
    turn = [*IDS, *one.output_ids[:3], 5, *SECOND]
    assert one.output_ids[3] != 5
    two = say(local, turn, fields())
    agree(say(local, turn, fields("")), two)
    assert report(two)["conversation_tokens"] == len(IDS) + 3 - PREFIX
    three = [*turn, *two.output_ids, *THIRD]
    assert (
        report(say(local, three, fields()))["conversation_tokens"]
        == len(turn) + ANSWER - 1 - PREFIX
    )
    # Another branch off the first turn.
    turn = [*IDS, *one.output_ids, *THIRD]
    assert report(say(local, turn, fields()))["conversation_tokens"] == (
        len(IDS) + ANSWER - 1 - PREFIX
    )
    # The very same turn again: all but its last token, which is always computed.
    again = say(local, IDS, fields())
    assert parts(again) == (PREFIX, len(IDS) - PREFIX - 1, 1, 0)
    # Another prefix: nothing.
    other = say(local, [*tokens(PREFIX, 99), *IDS[PREFIX:]], fields())
    assert report(other)["conversation_tokens"] == 0


def test_new_chunks_behind_an_earlier_turn_are_fused_as_ever(engine):
    local = stored(engine("llama"))
    one = say(local, IDS, fields())
    turn = [*IDS, *one.output_ids]
    spans = [*SPANS, len(turn), len(turn) + CHUNK]
    turn += [*CHUNKS[0], *SECOND]
    two = say(local, turn, fields(spans=spans))
    left = len(IDS) + ANSWER - 1 - PREFIX
    assert report(two)["conversation_tokens"] == left
    assert parts(two) == (PREFIX, left + CHUNK - 12, 12, 1 + len(SECOND))
    # EPIC counts 30% of each chunk; without the conversation those of turn one are chosen alike.
    agree(say(local, turn, fields("", spans=spans)), two)
    query = say(local, turn, fields(policy="query:0.6", spans=spans))
    assert report(query)["conversation_tokens"] == 0  # another policy, another namespace


def test_what_was_aborted_or_failed_is_not_kept(engine, monkeypatch):
    from sglang.srt.managers.io_struct import AbortReq

    from rag_pipeline.sglang_plugin.fusion.conversations import turns as conversation
    from rag_pipeline.sglang_plugin.fusion.forward import loader

    local = stored(engine("llama"))
    counts = local.runtime.metrics.counts
    req = local.submit(IDS, 50, fusion=fields())
    while len(req.output_ids) < 3:
        local.step()
    local.scheduler.abort_request(AbortReq(rid=req.rid))
    local.settle()
    with monkeypatch.context() as patch:
        patch.setattr(loader.Loader, "ensure", lambda *a, **k: 1 / 0)
        assert report(say(local, IDS, fields()))["fallback"] == "fused_pass_error"
    local.runtime.pass_succeeded()
    assert counts["turns.stored"] == 0
    # Keeping fails: the answer is there, and the slots go back all the same.
    with monkeypatch.context() as patch:
        patch.setattr(conversation, "capture_chunk", lambda *a, **k: 1 / 0)
        say(local, IDS, fields())
    assert (counts["turns.stored"], counts["turns.not_stored"]) == (0, 1)
    local.flush()
    local.runtime.store.check_integrity(expect_idle=True)


def test_an_evicted_turn_is_a_miss_and_so_is_what_stood_behind_it(engine):
    local = stored(engine("llama"))
    own = fields("evicted")  # a capture that failed in another test is remembered for a while
    one = say(local, IDS, own)
    turn = [*IDS, *one.output_ids, *SECOND]
    two = say(local, turn, own)
    store, spaces = local.runtime.store, local.runtime.conversations.table._spaces
    (segments,) = [own for own in spaces.of("") if store.state(own[0].key) is not None]
    assert len(segments) == 2
    assert store.evict(segments[0].key)
    three = [*turn, *two.output_ids, *THIRD]
    req = say(local, three, own)
    assert report(req)["conversation_tokens"] == 0
    assert parts(req)[1] > 0  # the chunks are still there
    # That turn is kept in their place.
    assert report(say(local, [*three, 9], own))["conversation_tokens"] == len(three) - PREFIX


def test_retraction_and_a_full_store_keep_pool_and_store_whole(engine, monkeypatch):
    from sglang.srt.managers import scheduler as module

    local = stored(engine("llama"))
    firsts = [say(local, [*IDS, 2 + i], fields(f"c{i}")) for i in range(4)]
    turns = [[*IDS, 2 + i, *one.output_ids, *SECOND] for i, one in enumerate(firsts)]
    calm = [local.ask(ids, 20, fusion=fields(f"c{i}")) for i, ids in enumerate(turns)]
    assert all(report(req)["conversation_tokens"] > 0 for req in calm)
    # Each asked anew, all at once, some thrown out while decoding: the turn's prompt is loaded again.
    monkeypatch.setattr(module, "TEST_RETRACT", True)
    reqs = [local.submit(ids, 20, fusion=fields(f"c{i}")) for i, ids in enumerate(turns)]
    local.run(*reqs)
    assert sum(req.retraction_count for req in reqs) > 0
    for one, two in zip(calm, reqs, strict=True):
        agree(one, two, 2e-3)
        assert report(two)["conversation_tokens"] > 0
    monkeypatch.undo()
    local.flush()  # SGLang's own leak check, and nothing locked
    # No room: turns are not kept, or the oldest go, and requests notice nothing.
    store = local.runtime.store
    monkeypatch.setattr(store._ledger, "byte_budget", store.stats().bytes_now)
    for i in range(6):
        req = say(local, [*IDS, 40 + i], fields(f"full{i}"))
        assert len(req.output_ids) == ANSWER
        assert store.stats().bytes_now <= store._ledger.byte_budget
    store.check_integrity(expect_idle=True)
