"""What of a conversation is near a question, and messages that are repeated behind a record."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from conversations import chat

from rag_pipeline.errors import RagPipelineError
from rag_pipeline.memory import Planner, Utterance, parse_memory
from rag_pipeline.memory.matching import Words, fused, votes

MakePlanner = Callable[..., Planner]
SYSTEM = "Be brief."
NEEDLE = "My locker at the station has the number 7341, and the key is under the blue flower pot."
ASKED = "Which number has the locker at the station?"
FILLER = chat(("garden", 12), ("music", 12), ("travel", 12), ("garden", 6))
LONG = [Utterance("user", NEEDLE), Utterance("assistant", "I will remember that."), *FILLER]
EPISODIC = ("epicache", "epicache-shared")


def test_words_are_scored_by_bm25_and_strange_words_by_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    words = Words(["the red house", "a blue house", ""])
    assert not caplog.records  # bm25s would tell a chat's user of each index
    red, blue, empty = words.scores("red")
    assert red > 0
    assert blue == empty == 0
    assert not words.scores("green").any()
    assert not words.scores("?!").any()
    assert not Words(["", "..."]).scores("red").any()
    assert words.scores("house house") == pytest.approx(words.scores("house"))


def test_ranks_are_fused_and_no_word_in_common_is_no_rank() -> None:
    near = np.array([0.9, 0.5, 0.1])
    assert fused([near], []) == pytest.approx([1 / 61, 1 / 62, 1 / 63])
    words = np.array([0.0, 0.0, 3.0])
    assert fused([near], [words]) == pytest.approx([1 / 61, 1 / 62, 1 / 63 + 1 / 61])
    assert fused([near], [np.zeros(3)]) == pytest.approx(fused([near], []))


def test_the_best_segments_vote_by_their_rank() -> None:
    near = np.array([0.5, 0.4, 0.3, 0.2, 0.1, 0.0])
    shares = votes(near, [1, 0, 0, 2, 2, 3], 5)
    total = 1 + 1 / 2 + 1 / 3 + 1 / 4 + 1 / 5
    wanted = [(1 / 2 + 1 / 3) / total, 1 / total, (1 / 4 + 1 / 5) / total, 0, 0]
    assert shares == pytest.approx(wanted)
    assert votes(near[:1], [1], 2) == pytest.approx([0, 1])


@pytest.mark.parametrize("method", EPISODIC)
def test_messages_near_the_question_stand_between_record_and_tail(
    make_planner: MakePlanner, method: str
) -> None:
    planner = make_planner(method=method, retrieved_share=0.4)
    plan = planner.plan(SYSTEM, LONG, ASKED)
    ranges = planner.utterance_ranges(SYSTEM, LONG)
    whole = make_planner(method="full").plan(SYSTEM, LONG, ASKED).candidates[0]
    for candidate in plan.candidates:
        assert candidate.slots == 192 - 76
        assert 0 < candidate.repeated_len <= 76
        assert ranges[0] in candidate.verbatim
        assert list(candidate.verbatim) == sorted(candidate.verbatim)
        ends = [end for _, end in candidate.verbatim]
        starts = [start for start, _ in candidate.verbatim]
        assert all(end <= start for end, start in zip(ends, starts[1:], strict=False))
        told = [
            whole.input_ids[at] for start, end in candidate.verbatim for at in range(start, end)
        ]
        behind = candidate.prefix_len + candidate.slots
        assert list(candidate.input_ids[behind : behind + len(told)]) == told
        assert len(told) == candidate.repeated_len + candidate.tail_len
        assert candidate.told <= 192 + 2 * 64


def test_records_do_not_depend_on_the_question(make_planner: MakePlanner) -> None:
    planner = make_planner(retrieved_share=0.4)
    asked = [planner.plan(SYSTEM, LONG, text) for text in (ASKED, "Which song was it?")]
    ids = [{chain.ids[-1] for chain in plan.ahead} for plan in asked]
    assert ids[0] == ids[1]
    for plan in asked:
        for chain in plan.ahead:
            # As long as everything fits, everything stays.
            assert [step.budget for step in chain] == [192] * 3 + [192 - 76] * (len(chain) - 3)
            assert [len(step.slot_ids) for step in chain][:5] == [0, 64, 128, 192, 192 - 76]


def test_a_record_with_room_for_everything_has_it_and_repeats_nothing(
    make_planner: MakePlanner,
) -> None:
    planner = make_planner(budget_tokens=2000, verbatim_tokens=0, retrieved_share=0.4)
    candidate = planner.plan(SYSTEM, LONG, ASKED).candidates[0]
    plan = make_planner(method="full").plan(SYSTEM, LONG, ASKED)
    assert candidate.repeated_len == 0
    assert candidate.slots == plan.history_tokens // 64 * 64
    assert candidate.input_ids == plan.candidates[0].input_ids


@pytest.mark.parametrize("method", ["snapkv", "streaming", "keydiff", "kvzip"])
def test_methods_without_episodes_repeat_nothing(make_planner: MakePlanner, method: str) -> None:
    plan = make_planner(method=method, retrieved_share=0.4).plan(SYSTEM, LONG, ASKED)
    for candidate in plan.candidates:
        assert (candidate.slots, candidate.repeated_len) == (192, 0)


def test_retrieval_finds_a_message_by_its_words(make_planner: MakePlanner) -> None:
    planner = make_planner(method="retrieval")
    (candidate,) = planner.plan(SYSTEM, LONG, ASKED).candidates
    assert planner.utterance_ranges(SYSTEM, LONG)[0] in candidate.verbatim


def test_a_history_within_the_budget_stands_as_it_is(make_planner: MakePlanner) -> None:
    short = LONG[:6]
    (candidate,) = make_planner(retrieved_share=0.4).plan(SYSTEM, short, ASKED).candidates
    assert (candidate.slots, candidate.repeated_len) == (0, 0)


@pytest.mark.parametrize("share", [-0.1, 0.91, "x", None, True])
def test_a_bad_share_is_one_line(share: object) -> None:
    with pytest.raises(
        RagPipelineError, match=r"retrieved_share is .*; give a number from 0.0 to 0.9"
    ):
        parse_memory({"retrieved_share": share})
