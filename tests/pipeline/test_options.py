"""Options, usage arithmetic, and the JSON contract; no engine."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from rag_pipeline.errors import RagPipelineError
from rag_pipeline.generation import extra_fields, usage_from_meta
from rag_pipeline.generation.base import delta
from rag_pipeline.prompt_layout import PromptBuilder
from rag_pipeline.question_run import QuestionRun
from rag_pipeline.server.conversation import read_conversation
from rag_pipeline.server.schemas import Message
from rag_pipeline.types import Answer, GenerationRequest, SamplingOptions, Source, Span, Timing


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be at least 1"),
        ({"max_new_tokens": 1.5}, "max_new_tokens is 1.5; it must be a whole number"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"repetition_penalty": 3.0}, "repetition_penalty is 3.0"),
    ],
)
def test_bad_sampling_options(options: dict[str, float], says: str) -> None:
    with pytest.raises(RagPipelineError) as error:
        SamplingOptions(**options)  # type: ignore[arg-type]
    assert says in str(error.value)


def test_policy_seam_refuses_what_it_does_not_know() -> None:
    for request in (
        GenerationRequest(input_ids=(1,)),
        GenerationRequest(input_ids=(1, 2, 3), spans=(Span(start=1, end=2),)),
    ):
        (action,) = extra_fields(request)["kv_hints"]["actions"]
        assert action["payload"]["mode"] == "off"
    with pytest.raises(RagPipelineError, match=r"policy 'magic' is unknown; allowed are prefix"):
        extra_fields(GenerationRequest(input_ids=(1,), policy="magic"))
    with pytest.raises(RagPipelineError, match="takes no ratio"):
        extra_fields(GenerationRequest(input_ids=(1,), ratio=0.5))


def test_policy_and_spans_travel_in_kv_hints() -> None:
    spans = (Span(start=4, end=9), Span(start=9, end=12))
    request = GenerationRequest(input_ids=tuple(range(20)), spans=spans, policy="query", ratio=0.2)
    (action,) = extra_fields(request)["kv_hints"]["actions"]
    assert action["payload"] == {
        "mode": "fuse",
        "prefix_len": 4,
        "spans": [[4, 9], [9, 12]],
        "policy": "query",
        "ratio": 0.2,
    }
    build = GenerationRequest(input_ids=tuple(range(9)), spans=spans[:1], build=True)
    (action,) = extra_fields(build)["kv_hints"]["actions"]
    assert action["payload"] == {"mode": "build", "prefix_len": 4, "spans": [[4, 9]]}


def test_usage_adds_up_with_and_without_the_fusion_report() -> None:
    plain = usage_from_meta({"cached_tokens": 30, "completion_tokens": 7}, prompt_tokens=100)
    assert (plain.exact_prefix_tokens, plain.fresh_tokens, plain.completion_tokens) == (30, 70, 7)
    report = {"exact_prefix_tokens": 20, "reused_tokens": 50, "recomputed_tokens": 10}
    fused = usage_from_meta({"cached_tokens": 80, "rag_fusion": report}, prompt_tokens=100)
    assert (fused.exact_prefix_tokens, fused.reused_tokens) == (20, 50)
    assert (fused.recomputed_tokens, fused.fresh_tokens) == (10, 20)


def test_delta_joins_to_the_whole_text_and_holds_back_half_characters() -> None:
    so_far = ["a", "a\ufffd", "aé", "aé", "aé\ufffd"]
    seen, pieces = 0, []
    for index, text in enumerate(so_far):
        piece, seen = delta(text, seen, incremental=False, final=index == len(so_far) - 1)
        pieces.append(piece)
    assert pieces == ["a", "", "é", "", "\ufffd"]
    assert delta("xy", 5, incremental=True, final=False) == ("xy", 7)


def test_answer_json_has_exactly_the_keys_of_the_contract() -> None:
    source = Source(id="i", title="t", path=None, score=0.5, text="not in the JSON")
    answer = Answer(
        answer="yes",
        sources=(source,),
        usage=usage_from_meta({}, prompt_tokens=3),
        timing=Timing(retrieve_s=0.1, ttft_s=0.2, total_s=0.3),
        policy="prefix",
        ratio=None,
    )
    found = answer.to_json()
    assert list(found) == [
        "answer", "sources", "usage", "timing", "policy", "ratio", "dropped_sources",
    ]  # fmt: skip
    assert found["sources"] == [{"id": "i", "title": "t", "path": None, "score": 0.5}]
    assert list(found["usage"]) == [
        "prompt_tokens", "exact_prefix_tokens", "reused_tokens", "recomputed_tokens",
        "fresh_tokens", "completion_tokens",
    ]  # fmt: skip
    assert list(found["timing"]) == ["retrieve_s", "ttft_s", "total_s"]


@pytest.mark.parametrize(
    ("text", "penalty"),
    [
        ('{"repetition_penalty": 1.05, "temperature": 0.7}', 1.05),
        ('{"temperature": 0.7}', 1.0),
        ('{"repetition_penalty": true}', 1.0),
        ('{"repetition_penalty": 40}', 1.0),
        ("[]", 1.0),
        ("{", 1.0),
        (None, 1.0),
    ],
)
def test_an_answer_is_decoded_with_the_penalty_that_the_models_publisher_names(
    text: str | None, penalty: float, smollm2_path: Path, tmp_path: Path
) -> None:
    for file in smollm2_path.iterdir():
        if file.suffix in (".json", ".jinja"):
            shutil.copy(file, tmp_path / file.name)
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    if text is not None:
        (tmp_path / "generation_config.json").write_text(text)
    builder = PromptBuilder(tmp_path)
    for given, used in ((None, penalty), (1.0, 1.0), (1.3, 1.3)):
        run = QuestionRun.start("q", 1, SamplingOptions(repetition_penalty=given), "prefix", None)
        request = run.lay_out(builder, [], context_length=2048)
        assert request.sampling.to_params()["repetition_penalty"] == used


def test_an_answer_ends_where_it_asks_its_own_question_again(smollm2_path: Path) -> None:
    """A small model goes on with the prompt's question; an answer may hold other questions."""
    builder = PromptBuilder(smollm2_path)
    run = QuestionRun.start("When? " * 40, 1, SamplingOptions(stop=("END",)), "prefix", None)
    stop = run.lay_out(builder, [], context_length=2048).sampling.to_params()["stop"]
    assert stop[0] == "END"
    assert stop[1].startswith("\nQuestion: When? When?")
    assert len(stop[1]) == 81
    talk = read_conversation([Message(role="user", content="Why?\nTell me.")])
    assert talk.echo == "\nQuestion: Why?"
