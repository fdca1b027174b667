"""What the server makes of a request and of an answer: conversations, fields, segments, attribution."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError

from rag_pipeline.memory import MemoryConfig
from rag_pipeline.prompts.history import question_part
from rag_pipeline.protocol import Usage
from rag_pipeline.server import schemas
from rag_pipeline.server.attribution import attribute
from rag_pipeline.server.errors import refusal_of
from rag_pipeline.server.question_part import read_conversation
from rag_pipeline.server.schemas import (
    ChatRequest,
    DocumentsRequest,
    MemoryOptions,
    Message,
    SearchRequest,
)
from rag_pipeline.server.token_strip import segments_of
from rag_pipeline.types import PromptLayout, Span


def test_a_conversation_stands_behind_the_chunks() -> None:
    plain = read_conversation([Message(role="user", content=" Why? ")])
    assert plain.query == "Why?"
    assert plain.asked.startswith("Question: Why?")
    assert question_part(plain.asked, plain.turns, plain.rules) == plain.asked
    talk = read_conversation(
        [
            Message(role="system", content="Answer in French."),
            Message(role="user", content="Who?"),
            Message(role="assistant", content="He."),
            Message(role="user", content=[{"type": "text", "text": "And why?"}]),
        ]
    )
    assert talk.query == "And why?"
    question = question_part(talk.asked, talk.turns, talk.rules)
    assert question == (
        "Answer in French.\n\nThe conversation so far:\nUser: Who?\nAssistant: He.\n\nQuestion: And why?"
    )


def test_of_a_long_message_the_beginning_is_searched_for_and_all_of_it_is_asked() -> None:
    text = "why? " * 30_000 + "Now you know."
    talk = read_conversation([Message(role="user", content=text)])
    assert talk.query == text[:8000]
    assert text in talk.asked


def layout() -> PromptLayout:
    return PromptLayout(
        input_ids=tuple(range(40)),
        system_span=Span(start=0, end=10),
        chunk_spans=(Span(start=10, end=20, chunk_id="a"), Span(start=20, end=34, chunk_id="b")),
        question_span=Span(start=34, end=40),
        text="",
    )


def usage(exact: int, reused: int, recomputed: int) -> Usage:
    return Usage(
        prompt_tokens=40,
        exact_prefix_tokens=exact,
        reused_tokens=reused,
        recomputed_tokens=recomputed,
        fresh_tokens=40 - exact - reused - recomputed,
        completion_tokens=1,
    )


def covers(runs: list[dict[str, Any]]) -> bool:
    edges = [0]
    for run in runs:
        assert run["start"] == edges[-1] < run["end"]
        edges.append(run["end"])
    return edges[-1] == 40


def test_segments_name_tokens_where_the_engine_does() -> None:
    rows = [[0, 12], [1, 5], [2, 3], [1, 14], [3, 6]]
    found = segments_of(layout(), usage(12, 19, 3), {"runs": rows})
    assert found["resolution"] == "token"
    assert covers(found["runs"])
    by_kind: dict[str, int] = {}
    for run in found["runs"]:
        by_kind[run["kind"]] = by_kind.get(run["kind"], 0) + run["end"] - run["start"]
    assert by_kind == {"exact_prefix": 12, "reused": 19, "recomputed": 3, "fresh": 6}
    assert [run["part"] for run in found["runs"]] == ["system", 1, 1, 1, 2, "question"]


def test_segments_do_not_claim_what_counts_do_not_say() -> None:
    plain = segments_of(layout(), usage(12, 0, 0), {})
    assert plain["resolution"] == "token"
    assert covers(plain["runs"])
    assert {run["kind"] for run in plain["runs"]} == {"exact_prefix", "fresh"}
    fused = segments_of(layout(), usage(10, 20, 4), {})
    assert fused["resolution"] == "part"
    assert covers(fused["runs"])
    assert [run["kind"] for run in fused["runs"]] == ["exact_prefix", "mixed", "mixed", "fresh"]
    reused = segments_of(layout(), usage(10, 24, 0), {})
    assert [run["kind"] for run in reused["runs"]] == ["exact_prefix", "reused", "reused", "fresh"]


def test_sentences_lean_on_the_chunk_that_has_their_words() -> None:
    sources = ["Cats sleep on the warm roof.", "The lighthouse keeper paints the purple door."]
    answer = "The keeper paints the door purple. Nobody knows why! Cats sleep."
    found = attribute(answer, sources)
    assert [(answer[a.start : a.end], a.number) for a in found] == [
        ("The keeper paints the door purple.", 2),
        ("Cats sleep.", 1),
    ]
    assert attribute("", sources) == attribute(answer, []) == []
    joined = "The keeper paints.\nThe door is purple. Cats sleep on the roof."
    assert [(a.start, a.number) for a in attribute(joined, sources)] == [(0, 2), (39, 1)]


USER = {"role": "user", "content": "hi"}


def test_an_answer_comes_back_as_history_as_the_openai_package_dumps_it() -> None:
    from openai.types.chat import ChatCompletionMessage
    from openai.types.chat.chat_completion_message import Annotation, AnnotationURLCitation

    cited = AnnotationURLCitation(end_index=1, start_index=0, title="t", url="u")
    answers = [
        ChatCompletionMessage(role="assistant", content="At nine."),
        ChatCompletionMessage(role="assistant", content="At nine.", tool_calls=[], annotations=[]),
        ChatCompletionMessage(
            role="assistant",
            content="At nine.",
            annotations=[Annotation(type="url_citation", url_citation=cited)],
        ),
        ChatCompletionMessage(role="assistant", refusal="At nine."),
    ]
    parts = [{"type": "text", "text": "At"}, {"type": "text", "text": "nine.", "annotations": []}]
    for dumped in [
        *(answer.model_dump() for answer in answers),
        {"role": "assistant", "content": parts, "name": None},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "At\nnine."}]},
    ]:
        request = ChatRequest.model_validate({"messages": [USER, dumped, USER]})
        assert request.messages[1].text().split() == ["At", "nine."]


def test_every_field_of_openais_schema_is_taken_where_it_changes_nothing() -> None:
    from openai.types.chat.completion_create_params import CompletionCreateParamsBase

    fields = set(CompletionCreateParamsBase.__annotations__) - {"messages"}
    for name in fields | {"a_field_of_next_year"}:
        ChatRequest.model_validate({"messages": [USER], name: None})
    neutral: dict[str, Any] = {
        "model": "m", "n": 1, "user": "u", "temperature": 0, "seed": 7, "tools": [],
        "tool_choice": "none", "parallel_tool_calls": True, "functions": [], "function_call": "auto",
        "response_format": {"type": "text"}, "logprobs": False, "top_logprobs": 0, "logit_bias": {},
        "modalities": ["text"], "reasoning_effort": "none", "verbosity": "medium", "store": True,
        "metadata": {"k": "v"}, "service_tier": "auto", "safety_identifier": "s", "stop": [],
        "prompt_cache_key": "k", "prompt_cache_retention": "24h", "max_completion_tokens": 5,
        "stream": False, "prediction": {"type": "content", "content": "x"}, "top_p": 1,
        "presence_penalty": 0, "frequency_penalty": 0,
    }  # fmt: skip
    for name, value in neutral.items():
        ChatRequest.model_validate({"messages": [USER], name: value})
    ChatRequest.model_validate({"messages": [USER], **neutral})


@pytest.mark.parametrize(
    ("extra", "line"),
    [
        ({"n": 2}, "n is 2"),
        ({"tools": [{"type": "function"}]}, "tools is"),
        ({"tool_choice": "required"}, "tool_choice is 'required'"),
        ({"functions": [{}]}, "functions is"),
        ({"logprobs": True}, "logprobs is True"),
        ({"top_logprobs": 3}, "top_logprobs is 3"),
        ({"logit_bias": {"5": 1}}, "logit_bias is"),
        ({"response_format": {}}, "response_format.type is missing"),
        ({"response_format": {"type": "json_object"}}, "response_format.type is 'json_object'"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"audio": {"voice": "v"}}, "audio is"),
        ({"reasoning_effort": "high"}, "reasoning_effort is 'high'"),
        ({"seed": 1, "temperature": 0.5}, "set temperature to 0, or leave seed out"),
        ({"a_field_of_next_year": 1}, "a_field_of_next_year is not known here"),
        ({"messages": [{**USER, "tool_calls": [{}]}, USER]}, "messages.0.tool_calls is"),
        ({"messages": [{"role": "tool", "content": "x"}, USER]}, "messages.0.role is 'tool'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "does not match any of the expected tags: 'text', 'refusal'",
        ),
    ],
)
def test_what_would_change_the_answer_is_refused_in_one_line(
    extra: dict[str, Any], line: str
) -> None:
    with pytest.raises(ValidationError) as error:
        ChatRequest.model_validate({"messages": [USER], **extra})
    found = [{**item, "loc": ("body", *item["loc"])} for item in error.value.errors()]
    refusal = refusal_of(RequestValidationError(found))
    assert refusal is not None
    assert refusal[0] == 400
    assert line in refusal[1]
    assert "\n" not in refusal[1]


MANY = 100_000


@pytest.mark.parametrize(
    ("schema", "body"),
    [
        (ChatRequest, {"messages": [{"role": "user", "content": [1] * MANY}]}),
        (ChatRequest, {"messages": [{"role": "user", "content": [{"type": "text"}] * MANY}]}),
        (ChatRequest, {"messages": [1] * MANY}),
        (ChatRequest, {"messages": [{str(key): 1 for key in range(MANY)}]}),
        (ChatRequest, {"messages": [{str(key): None for key in range(MANY)}]}),
        (ChatRequest, {"messages": [USER], **{str(key): 1 for key in range(MANY)}}),
        (ChatRequest, {"messages": [USER], "rag": {str(key): 1 for key in range(MANY)}}),
        (ChatRequest, {"messages": [USER], "logit_bias": {str(key): "x" for key in range(MANY)}}),
        (ChatRequest, {"messages": [USER], "modalities": [1] * MANY}),
        (ChatRequest, {"messages": [USER], "stop": [1] * MANY}),
        (ChatRequest, {"messages": [USER], "tools": [1] * MANY}),
        (SearchRequest, {"query": "x", **{str(key): 1 for key in range(MANY)}}),
        (DocumentsRequest, {"documents": [1] * MANY}),
        (DocumentsRequest, {"documents": [{str(key): 1 for key in range(MANY)}]}),
    ],
)
def test_a_body_of_a_hundred_thousand_faults_makes_a_handful_of_errors(
    schema: type[BaseModel], body: dict[str, Any]
) -> None:
    with pytest.raises(ValidationError) as error:
        schema.model_validate(body)
    assert error.value.error_count() <= 3
    found = [{**item, "loc": ("body", *item["loc"])} for item in error.value.errors()]
    refusal = refusal_of(RequestValidationError(found))
    assert refusal is not None
    assert len(refusal[1]) < 400


def test_what_was_given_is_shown_as_far_as_it_is_shown_without_writing_it_all() -> None:
    class Item:
        written = 0

        def __repr__(self) -> str:
            type(self).written += 1
            return "0"

    class Written(str):
        def __repr__(self) -> str:
            raise AssertionError("written as a whole")

    for given in ([Item()] * MANY, Written("é" * MANY), {"k": "é" * MANY}, 7, None, [1, "é"]):
        item = {"type": "x", "loc": ("body", "f"), "msg": "no", "input": given}
        refusal = refusal_of(RequestValidationError([item]))
        assert refusal is not None
        assert refusal[1].isascii()
        assert len(refusal[1]) < 120
    assert Item.written < 200


def test_a_request_may_set_every_field_of_a_memory() -> None:
    """One that a memory learns must not be left out here."""
    assert tuple(MemoryOptions.model_fields) == tuple(
        field.name for field in dataclasses.fields(MemoryConfig)
    )
    given = {"own_share": 0, "retrieved_share": 0.5, "episodes": 2}
    assert MemoryOptions(**given).model_dump(exclude_none=True) == given
    default = dataclasses.asdict(MemoryConfig())
    assert MemoryOptions(**default).model_dump() == default
    for wrong in ({"own_share": "0.5"}, {"own_share": True}, {"episodes": 2.0}, {"medoids": "4"}):
        with pytest.raises(ValidationError):
            MemoryOptions(**wrong)


def test_a_field_that_a_memory_learns_is_a_requests_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Learned(MemoryConfig):
        forgets: float | None = None

    monkeypatch.setattr(schemas, "MemoryConfig", Learned)
    assert tuple(schemas._memory_fields()) == (*MemoryOptions.model_fields, "forgets")
