"""Prompts and ids that follow from a conversation's content."""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from conversations import chat

from rag_pipeline.errors import RagPipelineError
from rag_pipeline.memory import MEMORY_METHODS, Planner, Utterance
from rag_pipeline.memory.plan import Candidate, MemoryPlan
from rag_pipeline.prompts.tokenizer import ModelTokenizer
from rag_pipeline.protocol import memory_id
from rag_pipeline.protocol.fields import parse_fields

MakePlanner = Callable[..., Planner]
SYSTEM = "Be brief."
LONG = chat(("garden", 12), ("music", 12), ("travel", 12), ("garden", 6))
CHAINED = ("epicache", "epicache-shared", "snapkv", "keydiff", "kvzip", "streaming")


def parts(plan: MemoryPlan, candidate: Candidate) -> tuple[tuple[int, ...], ...]:
    """Prefix, slots, tail and question."""
    ids, slots = candidate.input_ids, candidate.prefix_len + candidate.slots
    end = slots + candidate.tail_len
    return ids[: candidate.prefix_len], ids[candidate.prefix_len : slots], ids[slots:end], ids[end:]


def history_ids(make: MakePlanner, history: list[Utterance]) -> tuple[int, ...]:
    plan = make(method="full").plan(SYSTEM, history, "q?")
    return parts(plan, plan.candidates[0])[2]


@pytest.mark.parametrize("method", CHAINED)
def test_an_answer_is_prefix_slots_tail_question(make_planner: MakePlanner, method: str) -> None:
    plan = make_planner(method=method).plan(SYSTEM, LONG, "Where is the hotel?")
    history = history_ids(make_planner, LONG)
    for candidate in plan.candidates:
        _, slots, tail, question = parts(plan, candidate)
        seen = len(history) - len(tail)
        assert slots == history[seen - 192 : seen]
        assert tail == history[seen:]
        assert seen % 64 == 0
        assert len(tail) < 2 * 64
        assert question == parts(plan, plan.fallback)[3]
        (action,) = candidate.fusion.to_kv_hints()["actions"]
        fields = parse_fields(action["payload"], len(candidate.input_ids)).memory
        assert fields is not None
        assert [load.id for load in fields.load] == list(candidate.needs)
        assert [chain.ids[-1] for chain in candidate.chains] == list(candidate.needs)
    newest = max(plan.candidates, key=lambda one: -one.tail_len)
    assert plan.fallback.input_ids == newest.input_ids  # a missed record is this window


@pytest.mark.parametrize("method", CHAINED)
def test_ids_are_those_of_what_a_step_sends(make_planner: MakePlanner, method: str) -> None:
    plan = make_planner(method=method).plan(SYSTEM, LONG, "Where is the hotel?")
    history = history_ids(make_planner, LONG)
    for chain in plan.ahead:
        previous = ""
        for step, name in zip(chain, chain.ids, strict=True):
            request = step.request()
            (action,) = request.fusion.to_kv_hints()["actions"]
            memory = parse_fields(action["payload"], len(request.input_ids)).memory
            assert memory is not None
            assert memory.store is not None
            start = memory.load_end or request.fusion.prefix_len
            block = request.input_ids[start : memory.store.end]
            probe = request.input_ids[memory.store.end :]
            prefix = request.input_ids[: request.fusion.prefix_len]
            rule = memory.store.rule
            own, share = memory.store.own, memory.store.own_share
            wanted = memory_id(previous, prefix, block, probe, rule, 192, own, share)
            assert name == step.id == wanted
            assert len(request.input_ids) == step.peak_tokens
            if method != "epicache-shared":
                assert block == history[step.block * 64 : step.block * 64 + 64]
                assert len(step.slot_ids) == min(192, step.block * 64)
                assert (
                    step.slot_ids
                    == history[step.block * 64 - len(step.slot_ids) :][: len(step.slot_ids)]
                )
            previous = name


def test_peak_of_a_step_is_slots_block_and_probe_however_long_the_history(
    make_planner: MakePlanner,
) -> None:
    planner = make_planner()
    for history in (LONG, LONG * 3):
        plan = planner.plan(SYSTEM, history, "Where?")
        peaks = [step.peak_tokens for chain in plan.ahead for step in chain]
        assert max(peaks) <= plan.prefix_len + planner.method.step_tokens()
        assert (
            max(len(one.input_ids) for one in plan.candidates) <= plan.prefix_len + 192 + 128 + 40
        )


def test_growing_by_messages_gives_the_ids_of_a_replay(make_planner: MakePlanner) -> None:
    growing = make_planner(recluster_drift=0.5)
    seen: dict[tuple[int, int], tuple[str, ...]] = {}
    owned = 0
    for count in range(2, len(LONG) + 1, 2):
        plan = growing.plan(SYSTEM, LONG[:count], "And the garden?")
        replay = make_planner(recluster_drift=0.5).plan(SYSTEM, LONG[:count], "And the garden?")
        assert [one.needs for one in plan.candidates] == [one.needs for one in replay.candidates]
        assert [tuple(one.ids) for one in plan.ahead] == [tuple(one.ids) for one in replay.ahead]
        version = len(growing._view(SYSTEM, LONG[:count]).versions())
        for chain in plan.ahead:
            owned += sum(bool(step.own) for step in chain)
            known = seen.get((version, chain.episode), ())
            assert tuple(chain.ids[: len(known)]) == known
            seen[version, chain.episode] = tuple(chain.ids)
    assert max(version for version, _ in seen) > 2
    assert owned


def test_another_answer_to_the_same_history_keeps_what_was_before(
    make_planner: MakePlanner,
) -> None:
    planner = make_planner()
    planner.plan(SYSTEM, LONG, "q?")
    other = [*LONG[:-1], Utterance("assistant", "Something else.")]
    mine = planner.plan(SYSTEM, other, "q?")
    fresh = make_planner().plan(SYSTEM, other, "q?")
    assert [one.needs for one in mine.candidates] == [one.needs for one in fresh.candidates]
    # A shorter history of a known conversation is what it was.
    again = planner.plan(SYSTEM, LONG[:20], "q?")
    fresh = make_planner().plan(SYSTEM, LONG[:20], "q?")
    assert [one.needs for one in again.candidates] == [one.needs for one in fresh.candidates]


def test_threads_that_plan_one_conversation_at_once_get_the_plans_of_a_replay(
    make_planner: MakePlanner,
) -> None:
    fields = {"recluster_drift": 0.5, "switch_segments": 1}
    other = [*LONG[:30], *chat(("travel", 31))[30:]]
    histories = [LONG[:count] for count in range(4, len(LONG) + 1, 3)] * 2
    histories += [other[:count] for count in (31, 12, 30)]

    def ids(planner: Planner, history: list[Utterance]) -> list[tuple[str, ...]]:
        plan = planner.plan(SYSTEM, history, "And the garden?")
        return [*(one.needs for one in plan.candidates), *(tuple(one.ids) for one in plan.ahead)]

    wanted = [ids(make_planner(**fields), history) for history in histories]
    shared = make_planner(**fields)
    order = random.Random(3).sample(range(len(histories)), len(histories))
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda place: ids(shared, histories[place]), order))
    assert found == [wanted[place] for place in order]


def test_a_question_is_matched_to_its_topic(make_planner: MakePlanner) -> None:
    planner = make_planner(merge_margin=0.0, recluster_drift=50.0, switch_segments=0)
    labels = planner.episodes(SYSTEM, LONG)
    assert len(set(labels[:9])) == 3
    for question, segment in (("Who plays the violin?", 4), ("What grows in the garden?", 0)):
        plan = planner.plan(SYSTEM, LONG, question)
        assert plan.candidates[0].episodes == (labels[segment],)
        assert plan.ahead[0].episode == labels[segment]


def test_a_question_between_two_topics_loads_both_records(make_planner: MakePlanner) -> None:
    planner = make_planner(merge_margin=2.0)
    both, best = planner.plan(SYSTEM, LONG, "The violin in the garden?").candidates[:2]
    assert len(both.needs) == 2
    assert best.needs == both.needs[:1]
    assert both.input_ids == best.input_ids
    # As long as nothing was evicted, the records of all episodes are one.
    short = planner.plan(SYSTEM, LONG[:14], "The violin in the garden?")
    assert {len(one.needs) for one in short.candidates} <= {0, 1}


def test_steps_that_evict_nothing_are_the_same_for_every_method(make_planner: MakePlanner) -> None:
    first = {
        tuple(chain.ids[:3])
        for method in ("epicache", "snapkv", "streaming", "kvzip")
        for chain in make_planner(method=method).plan(SYSTEM, LONG, "q?").ahead
    }
    assert len(first) == 1
    fourth = {
        chain.ids[3]
        for method in ("epicache", "snapkv", "streaming", "kvzip")
        for chain in make_planner(method=method).plan(SYSTEM, LONG, "q?").ahead
    }
    assert len(fourth) == 6


def test_a_plan_tells_what_it_costs_and_counts_a_shared_step_once(
    make_planner: MakePlanner,
) -> None:
    plan = make_planner().plan(SYSTEM, LONG, "q?")
    blocks, tokens = len(plan.ahead[0]), 0
    for chain in plan.ahead:
        tokens += sum(64 + len(step.probe_ids) for step in chain[3:])
    assert len(plan.ahead) > 1
    assert plan.build_tokens == 3 * 64 + tokens
    shared = make_planner(method="epicache-shared").plan(SYSTEM, LONG, "q?")
    whole = [chain[0] for chain in shared.ahead]
    assert all(len(step.block_ids) == blocks * 64 for step in whole)
    assert shared.build_tokens == sum(step.forward_tokens for step in whole)


def test_a_switch_of_topic_keeps_the_steps_before_it(make_planner: MakePlanner) -> None:
    history = chat(("garden", 12), ("music", 12), ("travel", 24))
    planner = make_planner(episodes=2, recluster_growth=100.0, switch_segments=2, probe_tokens=64)
    chains = {chain.episode: chain for chain in planner.plan(SYSTEM, history, "q?").ahead}
    view = planner._view(SYSTEM, history)
    opened = view.versions()[0].episodes[2]
    assert opened.parent is not None
    branch = view.segment_start(opened.branch_segment) // 64
    parent = chains[opened.parent]
    assert chains[2].ids[:branch] == parent.ids[:branch]
    assert not set(chains[2].ids[branch:]) & set(parent.ids[branch:])


@pytest.mark.parametrize("method", ["epicache", "epicache-shared"])
def test_own_tokens_are_those_of_the_segments_of_the_episode(
    make_planner: MakePlanner, method: str
) -> None:
    planner = make_planner(method=method, recluster_drift=50.0, switch_segments=0, own_share=0.5)
    labels = planner.episodes(SYSTEM, LONG)
    ranges = planner.utterance_ranges(SYSTEM, LONG)
    plan = planner.plan(SYSTEM, LONG, "q?")
    clustered = planner._view(SYSTEM, LONG).versions()[0].made_at
    seen = set()
    for chain in plan.ahead:
        for step in chain:
            border = plan.prefix_len + (step.block + 1) * 64
            finished = sum(end < border for _, end in ranges) + 1  # the block ends in this one
            known = max(finished // 4, clustered)
            mine = []
            for token in range(plan.prefix_len, border):
                segment = next(i for i, (_, end) in enumerate(ranges) if token < end) // 4
                if segment >= known or labels[segment] == chain.episode:
                    mine.append(token)
            told = [token for start, end in step.own for token in range(start, end)]
            # Where nothing is evicted all episodes share a step.
            assert told == ([] if border <= plan.prefix_len + 192 else mine)
            assert step.own_share == (0.5 if told else 1.0)
            assert all(a[1] < b[0] for a, b in zip(step.own, step.own[1:], strict=False))
            seen.add((chain.episode, step.own[:1]))
    assert len({episode for episode, _ in seen}) == 3
    assert len({own for _, own in seen if own}) >= 3


def test_without_a_share_the_rule_is_the_published_one(make_planner: MakePlanner) -> None:
    planners = [make_planner(own_share=share) for share in (0.0, 0.5, 1.0)]
    plans = [planner.plan(SYSTEM, LONG, "q?") for planner in planners]
    assert not any(step.own for chain in plans[0].ahead for step in chain)
    for mine in zip(*(plan.ahead for plan in plans), strict=True):
        assert len({chain.ids[2] for chain in mine}) == 1
        assert len({chain.ids[-1] for chain in mine}) == 3
    one = make_planner(episodes=1, switch_segments=0).plan(SYSTEM, LONG, "q?")  # all is its own
    assert not any(step.own for chain in one.ahead for step in chain)


def test_a_switch_of_topic_brings_its_own_tokens(make_planner: MakePlanner) -> None:
    history = chat(("garden", 12), ("music", 12), ("travel", 24))
    planner = make_planner(episodes=2, recluster_growth=100.0, switch_segments=2, probe_tokens=64)
    plan = planner.plan(SYSTEM, history, "q?")
    view = planner._view(SYSTEM, history)
    opened = view.versions()[0].episodes[2]
    start = plan.prefix_len + view.segment_start(opened.branch_segment)
    (chain,) = (chain for chain in plan.ahead if chain.episode == 2)
    first = chain[view.segment_start(opened.branch_segment) // 64]
    assert first.own[0][0] == start
    (parent,) = (chain for chain in plan.ahead if chain.episode == opened.parent)
    left = plan.prefix_len + view.segment_start(opened.opened_at)
    assert not any(first < left and start < last for first, last in parent[-1].own)


@pytest.mark.parametrize("method", MEMORY_METHODS.names())
def test_a_short_history_stands_as_it_is(make_planner: MakePlanner, method: str) -> None:
    history = LONG[:2]
    plan = make_planner(method=method).plan(SYSTEM, history, "q?")
    (only,) = plan.candidates
    assert only.needs == ()
    assert parts(plan, only)[2] == history_ids(make_planner, history)
    assert plan.ahead == ()


@pytest.mark.parametrize("method", MEMORY_METHODS.names())
def test_every_prompt_fits_the_context(make_planner: MakePlanner, method: str) -> None:
    planner = make_planner(context_length=520, method=method)
    question = "word " * 150
    plan = planner.plan(SYSTEM, LONG, question, max_new_tokens=60)
    for candidate in (*plan.candidates, plan.fallback):
        assert len(candidate.input_ids) + 60 <= 520
        assert (
            candidate.input_ids[-len(parts(plan, plan.fallback)[3]) :]
            == parts(plan, plan.fallback)[3]
        )
    for chain in plan.ahead:
        assert all(step.peak_tokens < 520 for step in chain)
    with pytest.raises(RagPipelineError, match="the question does not fit"):
        planner.plan(SYSTEM, LONG, "word " * 500)


def test_retrieval_takes_the_closest_messages_within_the_budget(
    make_planner: MakePlanner, tokenizer: ModelTokenizer
) -> None:
    planner = make_planner(method="retrieval")
    plan = planner.plan(SYSTEM, LONG, "When does the orchestra rehearse the symphony?")
    (only,) = plan.candidates
    text = tokenizer.decode(parts(plan, only)[2])
    assert "orchestra rehearses" in text
    assert LONG[-1].text in text
    ranges = planner.utterance_ranges(SYSTEM, LONG)
    told = [r for r in ranges if any(a <= r[0] and r[1] <= b for a, b in only.verbatim)]
    assert sum(end - start for start, end in told) == only.tail_len
    assert only.tail_len <= 192 + 64 + max(end - start for start, end in ranges)


def test_ranges_of_messages_are_their_tokens(
    make_planner: MakePlanner, tokenizer: ModelTokenizer
) -> None:
    history = [*LONG[:3], Utterance("assistant", " "), *LONG[3:5]]
    planner = make_planner(method="full")
    ids = planner.plan(SYSTEM, history, "q?").candidates[0].input_ids
    ranges = planner.utterance_ranges(SYSTEM, history)
    for said, (start, end) in zip(history, ranges, strict=True):
        assert said.text.strip() in tokenizer.decode(ids[start:end])
        assert (end > start) == bool(said.text.strip())


def test_a_budget_beyond_the_context_is_refused_in_one_line(make_planner: MakePlanner) -> None:
    with pytest.raises(RagPipelineError, match="lower budget_tokens") as refused:
        make_planner(context_length=256)
    assert "\n" not in str(refused.value)


def test_a_short_conversation_asks_no_sentence_model(tokenizer: ModelTokenizer) -> None:
    def never(texts: list[str]) -> object:
        raise AssertionError(texts)

    from rag_pipeline.memory import MemoryConfig

    planner = Planner(MemoryConfig(), tokenizer, never, context_length=8192)  # type: ignore[arg-type]
    assert planner.plan(SYSTEM, LONG[:8], "q?").ahead == ()


def test_first_questions_of_many_conversations_forget_none(make_planner: MakePlanner) -> None:
    planner = make_planner()
    log = planner._view(SYSTEM, LONG[:4]).log
    for number in range(70):
        assert planner.plan(SYSTEM, [], f"Question {number}?").history_tokens == 0
    assert planner._view(SYSTEM, LONG[:4]).log is log


def test_half_a_surrogate_pair_is_a_character_like_another(make_planner: MakePlanner) -> None:
    """As a transcript's JSON may have it; neither a digest nor a sentence model takes it."""

    def plan(mark: str) -> MemoryPlan:
        history = [Utterance(said.role, f"{said.text} {mark}") for said in LONG]
        return make_planner(method="epicache").plan(f"S. {mark}", history, f"What? {mark}")

    odd, replaced = plan("\ud83d"), plan("\ufffd")
    assert odd.candidates[0].needs == replaced.candidates[0].needs != ()
    assert odd.candidates[0].input_ids == replaced.candidates[0].input_ids
