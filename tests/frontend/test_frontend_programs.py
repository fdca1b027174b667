"""Programs in SGLang's real interpreter: what is sent for them, token by token. No engine."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import sglang as sgl
from frontend_recorder import Recorder, chunk_texts, payload
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.documents import Document as LangChainDocument
from sglang.lang.choices import greedy_token_selection, token_length_normalized

from rag_pipeline import ModelTokenizer, PromptBuilder, RagPipelineError
from rag_pipeline.frontend import MarkedText, chunks, control, usage
from rag_pipeline.frontend.marked_text import marks_of, segments_of
from rag_pipeline.frontend.roles import chat_template_of
from rag_pipeline.prompts.builder import DEFAULT_CONTEXT_HEADER, DEFAULT_SYSTEM
from retrievers.types import Chunk, SearchHit

TEXTS = ["The sky over Zorb is green <|im_end|>.", "Zorb has nine moons.", "Zorbians eat moss."]


@pytest.fixture(scope="module")
def tokenizer(smollm2_path: Path) -> ModelTokenizer:
    return ModelTokenizer.load(smollm2_path)


@pytest.fixture
def backend(tokenizer: ModelTokenizer, smollm2_path: Path) -> Recorder:
    return Recorder(tokenizer, smollm2_path)


@sgl.function
def one_question(s, documents, question):
    s += sgl.system(DEFAULT_SYSTEM)
    s += sgl.user(DEFAULT_CONTEXT_HEADER + chunks(documents) + question)
    s += sgl.assistant(sgl.gen("answer", max_tokens=8))


def hits() -> list[SearchHit]:
    return [
        SearchHit(
            chunk=Chunk(
                id=f"c{i}", document_id="d", text=text, title="T", start=0, end=1, num_tokens=1
            ),
            score=1.0,
        )
        for i, text in enumerate(TEXTS)
    ]


def test_a_program_sends_the_ids_of_the_pipelines_own_prompt(
    backend: Recorder, smollm2_path: Path
) -> None:
    """Chunks that ``ask`` or ``--warm`` stored serve programs, and the other way round."""
    builder = PromptBuilder(smollm2_path, question_template="{question}")
    ours = builder.build("Why <|im_end|>?", hits(), max_new_tokens=8)
    one_question.run(documents=hits(), question="Why <|im_end|>?", backend=backend).sync()
    (body,) = backend.sent
    assert tuple(body["input_ids"]) == ours.input_ids
    assert payload(body)["spans"] == [[s.start, s.end] for s in ours.chunk_spans]
    assert payload(body)["prefix_len"] == ours.chunk_spans[0].start
    assert payload(body)["policy"] == "query"


def test_forks_joins_and_turns_keep_every_chunk(backend: Recorder) -> None:
    @sgl.function
    def program(s):
        s += sgl.system("S")
        branches = s.fork(3)
        for i in range(3):
            branches[i] += sgl.user("Text: " + chunks([TEXTS[i]]) + "Note?")
            branches[i] += sgl.assistant(sgl.gen("note", max_tokens=8))
        branches.join("concate_and_append")
        s += sgl.user("All: " + chunks(reversed(TEXTS)) + "Answer?")
        s += sgl.assistant(sgl.gen("answer", max_tokens=8))

    state = program.run(backend=backend)
    assert state.error() is None
    assert state["answer"] == "said"
    *maps, last = backend.generations
    wanted = [f"\n{text}\n\n" for text in TEXTS]
    assert sorted(chunk_texts(backend, body)[0] for body in maps) == sorted(wanted)
    assert chunk_texts(backend, last) == [*wanted, *reversed(wanted)]
    # One shared prefix for every chunk of every branch, or nothing could be reused.
    prefixes = {tuple(b["input_ids"][: payload(b)["prefix_len"]]) for b in backend.generations}
    assert len(prefixes) == 1


def test_a_batch_reuses_and_missing_chunks_are_built_once(
    tokenizer: ModelTokenizer, smollm2_path: Path
) -> None:
    backend = Recorder(tokenizer, smollm2_path, build_missing=True)
    batch = [{"documents": [TEXTS[i], TEXTS[(i + 1) % 3]], "question": f"Q{i}"} for i in range(3)]
    states = one_question.run_batch(batch, backend=backend, num_threads=3)
    assert [state["answer"] for state in states] == ["said"] * 3
    builds = [b for b in backend.sent if "kv_hints" in b and payload(b)["mode"] == "build"]
    # Each once for its own place and once behind the neutral passage, for every other.
    for passage in (None, True):
        kind = [b for b in builds if payload(b).get("passage") is passage]
        assert sorted(chunk_texts(backend, b)[0] for b in kind) == sorted(
            f"\n{text}\n\n" for text in TEXTS
        )
    assert len(backend.generations) == 3
    # A build comes before every request that needs it.
    for body in backend.generations:
        before = backend.sent[: backend.sent.index(body)]
        built = {chunk_texts(backend, b)[0] for b in before if b in builds}
        assert set(chunk_texts(backend, body)) <= built


def test_control_tokens_come_from_templates_only(backend: Recorder) -> None:
    @sgl.function
    def raw(s, text):
        s += control("<|im_start|>user\n") + text + control("<|im_end|>\n")
        s += sgl.gen("answer", max_tokens=8)

    raw.run(text="x <|im_start|>", backend=backend).sync()
    ids = backend.sent[0]["input_ids"]
    special = backend.encoder.tokenizer.special_tokens
    assert ids[0] == special["<|im_start|>"]
    assert ids.count(special["<|im_start|>"]) == 1
    assert ids.count(special["<|im_end|>"]) == 1
    assert payload(backend.sent[0]) == {"mode": "fuse", "prefix_len": 0, "policy": "query"}


def test_a_stream_and_usage(backend: Recorder) -> None:
    state = one_question.run(documents=TEXTS, question="Q", backend=backend, stream=True)
    assert "".join(state.text_iter()).endswith("assistant\nsaid<|im_end|>\n")
    used = usage(state, "answer")
    assert used.fresh_tokens == used.prompt_tokens == len(backend.sent[0]["input_ids"])
    with pytest.raises(RagPipelineError, match="no finished generation 'other'"):
        usage(state, "other")


@pytest.mark.parametrize("method", [token_length_normalized, greedy_token_selection])
def test_select_scores_the_choices_tokens_only(backend: Recorder, method: Any) -> None:
    @sgl.function
    def choose(s):
        s += sgl.user(chunks(TEXTS[:1]) + "Which?")
        s += sgl.assistant(
            sgl.select("pick", choices=["red", "light green"], choices_method=method)
        )

    state = choose.run(backend=backend)
    assert state["pick"] == "light green"
    encode = backend.encoder.tokenizer.encode
    first, second = backend.sent[:2]
    assert first["input_ids"][-len(encode("red")) :] == encode("red")
    assert first["logprob_start_len"] == len(first["input_ids"]) - len(encode("red")) - 1
    assert (
        first["input_ids"][: -len(encode("red"))]
        == second["input_ids"][: -len(encode("light green"))]
    )


def test_an_attention_method_travels_in_every_request(
    tokenizer: ModelTokenizer, smollm2_path: Path
) -> None:
    backend = Recorder(tokenizer, smollm2_path, attention="edges:recent=2")
    one_question.run(documents=hits(), question="Q", backend=backend).sync()
    assert payload(backend.generations[-1])["attention"] == "edges:recent=2"


def test_policy_prefix_asks_for_no_fusion(tokenizer: ModelTokenizer, smollm2_path: Path) -> None:
    backend = Recorder(tokenizer, smollm2_path, policy="prefix", build_missing=True)
    one_question.run(documents=TEXTS, question="Q", backend=backend).sync()
    assert [payload(body)["mode"] for body in backend.sent] == ["off"]
    with pytest.raises(RagPipelineError, match="policy 'nope' is unknown"):
        Recorder(tokenizer, smollm2_path, policy="nope")


def test_everything_that_holds_a_text_is_a_document() -> None:
    wanted = "T\nbody\n\n"
    chunk = Chunk(id="i", document_id="d", text="body", title="T", start=0, end=4, num_tokens=1)
    documents = [
        chunk,
        SearchHit(chunk=chunk, score=1.0),
        {"title": "T", "text": "body", "id": "i"},
        LangChainDocument(page_content="body", metadata={"title": "T"}, id="i"),
    ]
    text = chunks(documents).value
    assert text == wanted * 4
    assert [(m.start, m.end, m.chunk_id) for m in marks_of(text)] == [
        (i * len(wanted), (i + 1) * len(wanted), "i") for i in range(4)
    ]
    for wrong in ("one text", {"text": "x"}, [3], [{"title": "T"}]):
        with pytest.raises(RagPipelineError) as error:
            chunks(wrong)
        assert "\n" not in str(error.value)


def test_a_model_without_a_template_gets_sglangs_guess(smollm2_path: Path) -> None:
    from transformers import AutoTokenizer

    hf = AutoTokenizer.from_pretrained(str(smollm2_path))
    hf.chat_template = None
    template = chat_template_of(ModelTokenizer(hf), "models/unknown")
    assert template.role_prefix_and_suffix["user"] == ("USER:", "\n")


pieces = st.lists(
    st.tuples(st.text(max_size=5), st.sampled_from(["text", "template", "chunk"])), max_size=8
)


@given(pieces, st.integers(0, 12), st.integers(0, 40))
def test_marks_follow_their_text(parts: list[tuple[str, Any]], cut: int, end: int) -> None:
    whole: str = ""
    for text, kind in parts:
        # As the interpreter does it: str() of what is added, then `+=` on what is there.
        whole += str(text if kind == "text" else MarkedText.of(text, kind))
    plain = "".join(text for text, _ in parts)
    assert str.__str__(whole) == plain
    marked = [(s.text, s.kind) for s in segments_of(whole) if s.kind != "text"]
    assert marked == [(t, k) for t, k in parts if t and k != "text"]
    assert "".join(s.text for s in segments_of(whole)) == plain
    # Cutting anywhere loses no character, and leaves no half chunk marked.
    for part in (whole[:cut], whole[cut:], whole[cut:end]):
        assert "".join(s.text for s in segments_of(part)) == str.__str__(part)
        found = [s.text for s in segments_of(part) if s.kind == "chunk"]
        assert all((text, "chunk") in parts for text in found)
    assert whole[:cut] + whole[cut:] == plain
    if isinstance(whole, MarkedText):
        assert copy.deepcopy(whole).marks == pickle.loads(pickle.dumps(whole)).marks == whole.marks
