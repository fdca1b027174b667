"""A chat past the context window loses its oldest turns, whole, half a window at once, and says how many."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.documents import Document
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage

from rag_pipeline import ModelTokenizer, PromptBuilder, RagPipelineError
from rag_pipeline.langchain.layout import ChatLayouter
from rag_pipeline.prompts.history import HistoryMessage, turns_of
from rag_pipeline.prompts.segments import SegmentEncoder
from rag_pipeline.prompts.truncation import cut_points, first_that_fits, truncated
from rag_pipeline.question_run import QuestionRun
from retrievers import Chunk, SearchHit

LENGTHS = st.lists(st.integers(1, 60), max_size=30)


@given(LENGTHS, st.integers(20, 120), st.sampled_from([0.25, 0.5, 1.0]))
def test_cuts_stand_at_the_first_turn_behind_every_share_of_the_window(
    lengths: list[int], window: int, share: float
) -> None:
    unit = max(1, int(window * share))
    starts = [sum(lengths[:turn]) for turn in range(len(lengths))]
    grid = {
        next(turn for turn, start in enumerate(starts) if start >= mark)
        for mark in range(0, (starts[-1] if starts else -1) + 1, unit)
    }
    wanted = [turn for turn in sorted(grid) if sum(lengths[turn:]) <= 2 * window]
    assert list(cut_points(lengths, window, share)) == [*wanted, len(lengths)]


@given(LENGTHS, st.integers(20, 120), st.integers(0, 10))
def test_as_few_turns_as_fit_are_cut_and_a_growing_chat_is_cut_rarely(
    lengths: list[int], window: int, asked: int
) -> None:
    cuts, changes = [0], 0
    for size in range(len(lengths) + 1):
        now = lengths[:size]

        def lay_out(cut: int, now: list[int] = now) -> int:
            return sum(now[cut:]) + asked

        left, cut = first_that_fits(
            now, lay_out, lambda left: left <= window, context_length=window
        )
        assert left == lay_out(cut)
        assert left <= window or cut == size
        earlier = [place for place in cut_points(now, window) if place < cut]
        assert all(lay_out(place) > window for place in earlier)
        assert cut >= cuts[-1]  # what was cut does not come back
        changes += cut != cuts[-1]
        cuts.append(cut)
        assert truncated(now, cut) == (cut, sum(now[:cut]))
    # Not every turn: each cut frees half a window, or is of a turn that is longer than that.
    assert changes <= 1 + 2 * sum(lengths) // max(1, window // 2)


def test_with_truncation_disabled_nothing_is_cut() -> None:
    made, cut = first_that_fits(
        [50, 50], lambda cut: 100, lambda made: False, context_length=60, truncation="disabled"
    )
    assert (made, cut) == (100, 0)


@pytest.fixture(scope="module")
def builder(smollm2_path: Path) -> PromptBuilder:
    return PromptBuilder(smollm2_path, context_length=1200)


def chat(turns: int, words: int = 40) -> list[HistoryMessage]:
    return [
        HistoryMessage(role=role, text=f"{role} {turn} " + "word " * words)
        for turn in range(turns)
        for role in ("user", "assistant")
    ]


def hit(number: int, words: int) -> SearchHit:
    chunk = Chunk(
        id=str(number),
        document_id="d",
        title=f"T{number}",
        text="fact " * words,
        start=0,
        end=5 * words,
        num_tokens=words,
    )
    return SearchHit(chunk=chunk, score=-float(number))


def test_a_prompt_keeps_rules_question_and_the_newest_turns(builder: PromptBuilder) -> None:
    history = turns_of(chat(12))
    layout = builder.build("Why?", [], max_new_tokens=50, history=history, rules="Be brief.")
    assert len(layout.input_ids) + 50 <= 1200
    cut = layout.truncated.turns
    assert 0 < cut < 12
    assert f"User: user {cut} word" in layout.text
    assert f"user {cut - 1} word" not in layout.text
    assert "Be brief.\n\nThe conversation so far:\nUser: user" in layout.text
    assert "assistant 11 word" in layout.text
    assert layout.truncated.tokens >= 600
    assert layout.input_ids[: len(builder.system_ids)] == builder.system_ids
    # Some turns later the same ones are cut: the window is not full again.
    more = turns_of([*chat(12), *chat(17)[24:]])
    assert builder.build("And?", [], max_new_tokens=50, history=more).truncated.turns == cut
    with pytest.raises(RagPipelineError, match="the question does not fit"):
        builder.build("Why?", [], max_new_tokens=50, history=history, truncation="disabled")
    with pytest.raises(RagPipelineError, match="truncation is 'never'; choose one of auto, disabl"):
        builder.build("Why?", [], max_new_tokens=50, truncation="never")  # type: ignore[arg-type]
    with pytest.raises(RagPipelineError, match="cut_share is 0; give a part"):
        PromptBuilder(builder.tokenizer, context_length=600, cut_share=0)


def test_old_turns_go_before_chunks_that_have_no_more_than_half_of_the_window(
    builder: PromptBuilder,
) -> None:
    history = turns_of(chat(5))
    free = builder.build("Why?", [], max_new_tokens=50, context_length=600, history=history)
    assert free.truncated.turns == 0
    with_chunks = builder.build(
        "Why?", [hit(0, 100), hit(1, 100)], max_new_tokens=50, context_length=600, history=history
    )
    assert with_chunks.truncated.turns > 0
    assert not with_chunks.dropped
    # Chunks beyond that are dropped, and the newest turns stay.
    many = builder.build(
        "Why?",
        [hit(n, 100) for n in range(9)],
        max_new_tokens=50,
        context_length=600,
        history=history,
    )
    assert many.truncated == with_chunks.truncated
    assert len(many.chunks) >= 2
    assert many.dropped
    assert "assistant 4 word" in many.text


def test_an_endless_history_is_not_tokenised(builder: PromptBuilder) -> None:
    history = turns_of(
        HistoryMessage(role=role, text="word " * 40_000)
        for _ in range(100)
        for role in ("user", "assistant")
    )
    seen: list[int] = []

    class Counting(ModelTokenizer):
        def __init__(self, inner: ModelTokenizer) -> None:
            self.__dict__ = inner.__dict__

        def encode(self, text: str) -> list[int]:
            seen.append(len(text))
            return super().encode(text)

    counting = PromptBuilder(Counting(builder.tokenizer), context_length=600)
    layout = counting.build("Why?", [], max_new_tokens=50, history=history)
    assert layout.truncated.turns == 100
    assert layout.truncated.tokens > 100 * 70_000
    assert sum(seen) < 200_000


def test_a_question_carries_its_history(builder: PromptBuilder) -> None:
    said = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "He."}]
    run = QuestionRun.start("Why?", 3, history=said)
    answer = run.lay_out(builder, [], context_length=600)
    assert "The conversation so far:\nUser: Who?\nAssistant: He.\n\nQuestion: Why?" in (
        answer.layout.text
    )
    assert "truncated" not in answer.answer().to_json()
    long = QuestionRun.start("Why?", 3, history=chat(12)).lay_out(builder, [], context_length=600)
    assert long.answer().to_json()["truncated"]["turns"] > 0
    for bad, words in (
        ({"role": "tool", "content": "x"}, "role 'tool'"),
        ({"role": "user", "content": 3}, "content is a int"),
        ("Who?", "history holds a str"),
    ):
        with pytest.raises(RagPipelineError, match=words) as error:
            QuestionRun.start("Why?", 3, history=[bad])  # type: ignore[list-item]
        assert "\n" not in str(error.value)


def test_turns_begin_with_a_users_message_behind_an_answer() -> None:
    def roles(*given: str) -> list[list[str]]:
        messages = [HistoryMessage(role=role, text="x") for role in given]
        return [[message.role for message in turn] for turn in turns_of(messages)]

    user, assistant = "user", "assistant"
    assert roles() == []
    assert roles(user, assistant, user) == [[user, assistant], [user]]
    assert roles(assistant, user, user, assistant) == [[assistant], [user, user, assistant]]
    assert turns_of([HistoryMessage(role="user", text=" ")]) == ()


# -- LangChain ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def layouter(smollm2_path: Path) -> ChatLayouter:
    return ChatLayouter(SegmentEncoder(ModelTokenizer.load(smollm2_path)), context_length=600)


def messages(turns: int) -> list[BaseMessage]:
    said: list[BaseMessage] = [SystemMessage("Be brief.")]
    for message in chat(turns):
        kind = HumanMessage if message.role == "user" else AIMessage
        said.append(kind(message.text))
    return [*said, HumanMessage("Why?")]


def test_langchain_keeps_the_system_message_and_whole_turns(layouter: ChatLayouter) -> None:
    short = layouter.build(messages(2), (), max_new_tokens=50)
    assert short.truncated.turns == 0
    assert "truncated" not in short.facts
    layout = layouter.build(messages(12), (), max_new_tokens=50)
    cut = layout.truncated.turns
    assert 0 < cut < 12
    assert len(layout.input_ids) + 50 <= 600
    assert layout.facts["truncated"] == {"turns": cut, "tokens": layout.truncated.tokens}
    assert [message.type for message in layout.messages[:2]] == ["system", "human"]
    assert str(layout.messages[1].content).startswith(f"user {cut} ")
    text = layouter.encoder.tokenizer.decode(layout.input_ids)
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nuser")
    # The part that all prompts of the conversation share is what the turns that stay are moved behind.
    shared = layout.input_ids[: layout.prefix_len]
    assert shared == short.input_ids[: short.prefix_len]
    assert layouter.encoder.tokenizer.decode(shared).endswith("<|im_start|>user\n")
    # What is left is the end of the conversation, token for token.
    whole = dataclasses.replace(layout, messages=())
    full = ChatLayouter(layouter.encoder, context_length=8192).build(
        messages(12), (), max_new_tokens=50
    )
    behind = whole.input_ids[layout.prefix_len :]
    assert full.input_ids[-len(behind) :] == behind
    with pytest.raises(RagPipelineError, match="the context holds 600: shorten it"):
        layouter.build(messages(12), (), max_new_tokens=50, truncation="disabled")
    with pytest.raises(RagPipelineError, match="the context holds 600: shorten it"):
        layouter.build([HumanMessage("word " * 700)], (), max_new_tokens=50)


def test_langchain_cuts_turns_for_documents(layouter: ChatLayouter) -> None:
    documents = [Document(page_content="fact " * 200, id="a")]
    assert layouter.build(messages(5), (), max_new_tokens=50).truncated.turns == 0
    layout = layouter.build(messages(5), documents, max_new_tokens=50)
    assert layout.documents == ("a",)
    assert layout.truncated.turns > 0
