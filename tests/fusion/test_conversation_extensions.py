"""A conversation memory from outside the package decides what a second turn loads, in the real engine."""

from __future__ import annotations

import dataclasses

import pytest
from fusion_helpers import (
    PREFIX_IDS,
    SWAPPED,
    SWAPPED_SPANS,
    enter_prefix,
    registered,
    report,
    tokens,
)

from chunk_cache import Build, ChunkKey, Match, hash_token_ids
from rag_pipeline.errors import EngineError
from rag_pipeline.sglang_plugin.fusion.builds.capture import capture_chunk
from rag_pipeline.sglang_plugin.fusion.config import FusionConfig
from rag_pipeline.sglang_plugin.fusion.conversation_memories import CONVERSATION_MEMORIES
from rag_pipeline.sglang_plugin.fusion.conversations.base import ConversationMemory
from rag_pipeline.sglang_plugin.fusion.request.holdings import Capture, LeasedSpan

KEPT = 24


SECOND = tokens(18, 3)
FIELDS = {"spans": SWAPPED_SPANS, "policy": "reuse", "conversation": "c"}


class NewestTokens(ConversationMemory):
    """Keeps only the last tokens of the newest turn, and nothing of what stands in front."""

    name = "newest-tokens"

    def __init__(self, runtime):
        super().__init__(runtime)
        self.last = {}

    def _space(self, state, tenant):
        return tenant, state.request.conversation, state.policy.identity

    def lease(self, state, tenant):
        kept = self.last.get(self._space(state, tenant))
        if kept is None:
            return
        head, start, end, key = kept
        if hash_token_ids(state.prompt[:end]) != head:
            return
        found = self.runtime.store.acquire_matches(state.prompt, [Match(start, end, key)])
        spans = [LeasedSpan(match=match, lease=lease, is_turn=True) for match, lease in found]
        if spans:
            state.set_turns(spans, end=spans[-1].end, turn=7)

    def keep(self, turn):
        start, end = turn.kv_len - KEPT, turn.kv_len
        facts = self.runtime.facts
        tenant = repr(self._space(turn.state, turn.tenant))
        context = facts.context(prefix_digest=hash_token_ids(turn.ids[:start]), tenant=tenant)
        key = ChunkKey.of(context, turn.ids[start:end])
        build = self.runtime.store.begin_build(key, turn.ids[start:end], owner="turn", tenant="")
        if not isinstance(build, Build):
            return False
        with build:
            capture = Capture(start=start, end=end, base_position=start, build=build)
            build.commit(
                capture_chunk(facts.layout, turn.pool, facts.num_layers, turn.slots, capture)
            )
        head = hash_token_ids(turn.ids)
        self.last[self._space(turn.state, turn.tenant)] = (head, start, end, key)
        return True

    def forget(self, keys=None):
        if keys is None:
            self.last.clear()


def new_weights(runtime, monkeypatch):
    """Begin another epoch, and end it with the test: the engine is shared."""
    monkeypatch.setattr(runtime, "epoch", runtime.epoch)
    monkeypatch.setattr(runtime, "facts", runtime.facts)
    runtime.new_weights(in_update=False, tree_is_old=False)


@pytest.fixture
def local(stocked):
    enter_prefix(stocked)
    return stocked


def test_a_conversation_memory(local, monkeypatch):
    memory = NewestTokens(local.runtime)
    monkeypatch.setattr(local.runtime, "conversations", memory)
    one = local.ask(SWAPPED, 6, fusion=FIELDS)
    (kept,) = memory.last.values()
    end = len(SWAPPED) + len(one.output_ids) - 1
    assert kept[1:3] == (end - KEPT, end)
    two = local.ask([*SWAPPED, *one.output_ids, *SECOND], 2, fusion=FIELDS)
    # The toy kept so many tokens and no more, and chunks in front of its turns' end are not loaded.
    assert report(two)["conversation_tokens"] == report(two)["reused_tokens"] == KEPT
    assert report(two)["exact_prefix_tokens"] == len(PREFIX_IDS)
    # The same two turns of another conversation find nothing of it.
    other = FIELDS | {"conversation": "d"}
    alone = local.ask([*SWAPPED, *one.output_ids, *SECOND], 2, fusion=other)
    assert report(alone)["conversation_tokens"] == 0
    new_weights(local.runtime, monkeypatch)
    assert memory.last == {}
    local.flush()
    local.runtime.store.check_integrity(expect_idle=True)


def test_a_memory_is_chosen_by_its_name_and_an_unknown_one_is_refused():
    from rag_pipeline.sglang_plugin.fusion.runtime.runtime import FusionRuntime

    assert FusionRuntime(FusionConfig(), None).conversations.name == "turns"
    with registered(CONVERSATION_MEMORIES, NewestTokens):
        config = FusionConfig(conversation_memory="newest-tokens")
        assert isinstance(FusionRuntime(config, None).conversations, NewestTokens)
    with pytest.raises(EngineError, match=r"conversation_memory is 'newest-tokens'; .* turns"):
        FusionConfig(conversation_memory="newest-tokens")


class Unordered(NewestTokens):
    """Hands out what it kept twice, the later part first: no memory may do so."""

    name = "unordered"

    def lease(self, state, tenant):
        super().lease(state, tenant)
        if state.spans:
            (span,) = state.spans
            middle = span.start + KEPT // 2
            halves = [
                dataclasses.replace(span, match=span.match.clipped(*part))
                for part in ((middle, span.end), (span.start, middle))
            ]
            state.set_turns(halves, end=span.end, turn=7)


def test_a_memory_that_breaks_its_contract_costs_speed_only(local, monkeypatch):
    monkeypatch.setattr(local.runtime, "conversations", Unordered(local.runtime))
    one = local.ask(SWAPPED, 6, fusion=FIELDS)
    again = [*SWAPPED, *one.output_ids, *SECOND]
    local.flush()
    two = local.ask(again, 2, fusion=FIELDS)
    assert report(two)["fallback"] == "internal_error"
    local.flush()
    assert local.ask(again, 2, fusion={"mode": "off"}).output_ids == two.output_ids
    local.runtime.store.check_integrity(expect_idle=True)


def test_a_memory_that_cannot_forget_or_be_made(local, monkeypatch):
    from rag_pipeline.sglang_plugin.fusion.runtime.runtime import FusionRuntime

    class Forgetful(NewestTokens):
        name = "forgetful"

        def forget(self, keys=None):
            raise RuntimeError("no")

    monkeypatch.setattr(local.runtime, "conversations", Forgetful(local.runtime))
    before = local.runtime.facts.context_fields["model_fingerprint"]
    new_weights(local.runtime, monkeypatch)
    assert local.runtime.facts.context_fields["model_fingerprint"] != before

    class Broken(NewestTokens):
        name = "broken"

        def __init__(self, runtime):
            raise RuntimeError("two\nlines")

    with registered(CONVERSATION_MEMORIES, Broken):
        runtime = FusionRuntime(FusionConfig(conversation_memory="broken"), None)
    assert runtime.conversations.name == "turns"
    assert "'broken' cannot be used" in runtime.off_reason
    assert "\n" not in runtime.off_reason
