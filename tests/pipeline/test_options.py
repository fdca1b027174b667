"""Options, usage arithmetic, and the JSON contract; no engine."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from rag_pipeline.errors import RagPipelineError
from rag_pipeline.prompts.builder import PromptBuilder
from rag_pipeline.protocol import (
    AbortedError,
    FusionChoice,
    FusionRequest,
    GenerationRequest,
    SamplingOptions,
    StreamReader,
    build_requests,
    fusion_report,
    usage_from_meta,
)
from rag_pipeline.question_run import QuestionRun
from rag_pipeline.server.question_part import read_conversation
from rag_pipeline.server.schemas import Message
from rag_pipeline.types import Answer, Source, Span, Timing


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


def payload_of(fusion: FusionRequest) -> dict[str, Any]:
    (action,) = fusion.to_kv_hints()["actions"]
    payload: dict[str, Any] = action["payload"]
    return payload


def test_policy_seam_refuses_what_it_does_not_know() -> None:
    assert payload_of(GenerationRequest(input_ids=(1,)).fusion)["mode"] == "off"
    assert payload_of(FusionChoice().request((Span(start=1, end=2),)))["mode"] == "off"
    with pytest.raises(RagPipelineError, match=r"policy 'magic' is unknown; allowed are prefix"):
        FusionChoice(policy="magic").check()
    with pytest.raises(RagPipelineError, match="takes no ratio"):
        FusionChoice(ratio=0.5).check()


def test_policy_and_spans_travel_in_kv_hints() -> None:
    spans = (Span(start=4, end=9), Span(start=9, end=12))
    assert payload_of(FusionChoice(policy="query", ratio=0.2).request(spans)) == {
        "mode": "fuse",
        "prefix_len": 4,
        "spans": [[4, 9], [9, 12]],
        "policy": "query",
        "ratio": 0.2,
    }
    own, elsewhere = build_requests(4, 5)
    assert payload_of(own) == {"mode": "build", "prefix_len": 4, "spans": [[4, 9]]}
    assert payload_of(elsewhere) == {**payload_of(own), "passage": True}


def test_usage_adds_up_with_and_without_the_fusion_report() -> None:
    plain = usage_from_meta({"cached_tokens": 30, "completion_tokens": 7}, prompt_tokens=100)
    assert (plain.exact_prefix_tokens, plain.fresh_tokens, plain.completion_tokens) == (30, 70, 7)
    report = {"exact_prefix_tokens": 20, "reused_tokens": 50, "recomputed_tokens": 10}
    fused = usage_from_meta({"cached_tokens": 80, "rag_fusion": report}, prompt_tokens=100)
    assert (fused.exact_prefix_tokens, fused.reused_tokens) == (20, 50)
    assert (fused.recomputed_tokens, fused.fresh_tokens) == (10, 20)


def message(text: str, **meta: Any) -> dict[str, Any]:
    return {"text": text, "meta_info": {"finish_reason": None, **meta}}


def test_a_stream_joins_to_the_whole_text_and_holds_back_half_characters() -> None:
    reader = StreamReader(incremental=False)
    so_far = ["a", "a\ufffd", "aé", "aé"]
    pieces = [reader.read(message(text)).text for text in so_far]
    pieces.append(reader.read(message("aé\ufffd", finish_reason={"type": "stop"})).text)
    assert pieces == ["a", "", "é", "", "\ufffd"]
    assert reader.finish == "stop"
    incremental = StreamReader(incremental=True)
    assert [incremental.read(message(text)).text for text in ("xy", "xy")] == ["xy", "xy"]


def test_what_one_message_reports_later_pieces_hold_too() -> None:
    reader = StreamReader(incremental=True)
    report = {"exact_prefix_tokens": 20, "reused_tokens": 50, "recomputed_tokens": 10}
    first = reader.read(message("x", rag_fusion=report, cached_tokens=80))
    last = reader.read(message("y", rag_fusion=[], completion_tokens=2))
    assert fusion_report(first.meta_info) == fusion_report(last.meta_info) == report
    assert usage_from_meta(last.meta_info, prompt_tokens=100).completion_tokens == 2


def test_an_abort_says_who_gave_up_and_why() -> None:
    ended = {"type": "abort", "message": "out of memory", "status_code": 503}
    with pytest.raises(AbortedError, match="the server aborted the request: out of memory") as told:
        StreamReader(incremental=True, sender="server").read(message("", finish_reason=ended))
    assert (told.value.reason, told.value.status) == ("out of memory", 503)
    with pytest.raises(AbortedError, match="the engine aborted the request: no reason"):
        StreamReader(incremental=True).read(message("", finish_reason={"type": "abort"}))
    with pytest.raises(AbortedError, match="the engine aborted the request: no reason") as told:
        StreamReader(incremental=True).read(message("", finish_reason="abort"))
    assert told.value.status is None


def test_an_empty_list_is_kept_unless_an_earlier_message_said_more() -> None:
    reader = StreamReader(incremental=True)
    first = reader.read(message("x", input_token_logprobs=[], rag_fusion={"reused_tokens": 1}))
    last = reader.read(message("y", input_token_logprobs=[], rag_fusion=[]))
    assert first.meta_info["input_token_logprobs"] == last.meta_info["input_token_logprobs"] == []
    assert last.meta_info["rag_fusion"] == {"reused_tokens": 1}


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
        run = QuestionRun.start("q", 1, sampling=SamplingOptions(repetition_penalty=given))
        request = run.lay_out(builder, [], context_length=2048).request
        assert request.sampling.to_params()["repetition_penalty"] == used


def test_an_answer_ends_where_it_asks_its_own_question_again(smollm2_path: Path) -> None:
    """A small model goes on with the prompt's question; an answer may hold other questions."""
    builder = PromptBuilder(smollm2_path)
    run = QuestionRun.start("When? " * 40, 1, sampling=SamplingOptions(stop=("END",)))
    stop = run.lay_out(builder, [], context_length=2048).request.sampling.to_params()["stop"]
    assert stop[0] == "END"
    assert stop[1].startswith("\nQuestion: When? When?")
    assert len(stop[1]) == 81
    talk = read_conversation([Message(role="user", content="Why?\nTell me.")])
    assert talk.echo == "\nQuestion: Why?"
