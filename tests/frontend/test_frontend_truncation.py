"""Programs whose chat outgrows the context: what is sent of it, token by token. No engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sglang as sgl
from frontend_recorder import Recorder, chunk_texts, payload

from rag_pipeline import ModelTokenizer, RagPipelineError
from rag_pipeline.frontend import MarkedText, chunks, truncated
from rag_pipeline.frontend.turns import turn_starts, without_turns
from rag_pipeline.types import Truncated

CONTEXT = 400
ANSWER = 8


@pytest.fixture(scope="module")
def tokenizer(smollm2_path: Path) -> ModelTokenizer:
    return ModelTokenizer.load(smollm2_path)


@pytest.fixture
def make(tokenizer: ModelTokenizer, smollm2_path: Path) -> Any:
    return lambda **options: Recorder(
        tokenizer, smollm2_path, **{"context_length": CONTEXT, **options}
    )


@sgl.function
def chat(s, turns, opening=""):
    s += opening
    s += sgl.system("Be brief.")
    for turn in range(turns):
        s += sgl.user(
            f"Question {turn}: " + chunks([f"Fact {turn}. " + 5 * "Zorb has moons. "]) + "Why?"
        )
        s += sgl.assistant(sgl.gen(f"answer{turn}", max_tokens=ANSWER))


def sent(backend: Recorder, body: Any) -> str:
    text: str = backend.encoder.tokenizer.decode(body["input_ids"])
    return text


def test_a_chat_that_outgrows_the_window_loses_its_oldest_turns_and_goes_on(make: Any) -> None:
    backend = make()
    state = chat.run(turns=20, backend=backend)
    assert state.error() is None
    assert len(backend.generations) == 20
    cuts = []
    for turn, body in enumerate(backend.generations):
        assert len(body["input_ids"]) + ANSWER <= CONTEXT
        told = truncated(state, f"answer{turn}")
        cut = told.turns
        cuts.append(cut)
        text = sent(backend, body)
        # Whole turns go, and what is in front of the first one stays.
        assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
        numbers = [n for n in range(20) if f"Question {n}:" in text]
        assert numbers == list(range(cut, turn + 1))
        facts = chunk_texts(backend, body)
        assert all(f"Fact {n}." in one for n, one in zip(numbers, facts, strict=True))
        assert payload(body).get("truncated", [0, 0]) == [*told]
        assert (told.tokens > 0) == (cut > 0)
    assert cuts == sorted(cuts)
    # Half a window goes at once, so that what stays keeps its place for many turns.
    assert cuts[-1] > 0
    assert len(set(cuts)) <= 1 + 20 * 60 // (CONTEXT // 2)
    # The program itself has lost nothing.
    assert all(f"Question {n}:" in state.text() for n in range(20))


def test_what_is_left_is_what_a_shorter_program_sends(make: Any) -> None:
    backend, short = make(), make()
    state = chat.run(turns=9, backend=backend)
    cut = truncated(state, "answer8").turns
    assert cut

    @sgl.function
    def rest(s):
        s += sgl.system("Be brief.")
        for turn in range(cut, 9):
            fact = f"Fact {turn}. " + 5 * "Zorb has moons. "
            s += sgl.user(f"Question {turn}: " + chunks([fact]) + "Why?")
            s += sgl.assistant(sgl.gen("answer", max_tokens=ANSWER))

    rest.run(backend=short).sync()
    ours, theirs = backend.generations[-1], short.generations[-1]
    assert ours["input_ids"] == theirs["input_ids"]
    assert payload(ours)["spans"] == payload(theirs)["spans"]


def test_disabled_sends_all(make: Any) -> None:
    backend = make(truncation="disabled")
    state = chat.run(turns=9, backend=backend)
    assert truncated(state, "answer8") == Truncated()
    assert len(backend.generations[-1]["input_ids"]) > CONTEXT
    with pytest.raises(RagPipelineError, match="'oldest'; choose one of auto, disabled"):
        make(truncation="oldest")


def test_streams_exact_programs_choices_and_forks_are_cut_alike(make: Any) -> None:
    backend = make(policy="prefix")

    @sgl.function
    def program(s):
        s += sgl.system("Be brief.")
        for turn in range(9):
            s += sgl.user(f"Question {turn}: " + 25 * "Why so? ")
            s += sgl.assistant(sgl.gen(f"answer{turn}", max_tokens=ANSWER))
        s += sgl.user("Yes or no?")
        s += sgl.assistant_begin()
        for branch in s.fork(2):
            branch += sgl.select("pick", choices=["Yes", "No"])

    state = program.run(backend=backend, stream=True)
    assert "".join(state.text_iter("answer8")) == "said"
    assert truncated(state, "answer8").turns > 0
    state.text()  # to the end
    assert state.error() is None
    assert all(len(body["input_ids"]) <= CONTEXT for body in backend.sent)
    assert all("Question 0" not in sent(backend, body) for body in backend.sent[-3:])


def test_what_no_cut_makes_room_for_is_sent_whole_and_text_without_roles_too(make: Any) -> None:
    backend = make()

    @sgl.function
    def plain(s):
        s += 100 * "Why so, why not? " + sgl.gen("answer", max_tokens=ANSWER)

    plain.run(backend=backend).sync()
    assert len(backend.generations[-1]["input_ids"]) > CONTEXT

    @sgl.function
    def greedy(s):
        for turn in range(3):
            s += sgl.user(f"Question {turn}: " + 25 * "Why so? ")
            s += sgl.assistant(sgl.gen("answer", max_tokens=CONTEXT))

    greedy.run(backend=backend).sync()
    assert "Question 0" in sent(backend, backend.generations[-1])


def test_where_turns_begin() -> None:
    def opens(role: str) -> MarkedText:
        return MarkedText.of(f"<{role}>", "template", role=role)

    text: Any = MarkedText("head ")
    for role in ("system", "user", "user", "assistant", "system", "user"):
        text = text + opens(role) + "said."
    starts = turn_starts(text)
    assert [str.__str__(text)[at:][:6] for at in starts] == ["<user>"] * 2
    assert without_turns(text, starts, 1) == "head <system>said.<user>said."
    # Half an opening is none.
    assert turn_starts(text[starts[1] + 1 :]) == ()
    assert turn_starts("plain") == ()
