"""The parts of the server that need no engine: tenants, segments, the guard, error lines."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from rag_pipeline.cli import main
from rag_pipeline.errors import RagPipelineError
from rag_pipeline.server.attribution import attribute
from rag_pipeline.server.conversation import read_conversation
from rag_pipeline.server.errors import refusal_of
from rag_pipeline.server.keys import EVERYBODYS_DIGESTS, digest_of, read_key
from rag_pipeline.server.schemas import ChatRequest, Message
from rag_pipeline.server.segments import segments_of
from rag_pipeline.server.tenants import Tenants, parse_indexes
from rag_pipeline.types import PromptLayout, Span, Usage

KEY = "a-key-of-enough-letters"


# -- tenants ------------------------------------------------------------------------------------


def load(tmp_path: Path, content: Any) -> Tenants:
    path = tmp_path / "tenants.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return Tenants.load({"main": tmp_path / "main"}, path, operator_key="operators-own-key")


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("{", "cannot be read as JSON"),
        ({}, "at least one tenant"),
        ({"Acme": {"api_key": KEY, "index": "x"}}, "'Acme' is not a name"),
        ({"../up": {"api_key": KEY, "index": "x"}}, "is not a name"),
        ({"operator": {"api_key": KEY, "index": "x"}}, "choose another"),
        ({"acme": {"api_key": "short", "index": "x"}}, "16 or more"),
        ({"acme": {"index": "x"}}, "needs one of api_key"),
        ({"acme": {"api_key": KEY, "api_key_sha256": "0" * 64, "index": "x"}}, "needs one of"),
        ({"acme": {"api_key_sha256": "zz", "index": "x"}}, "64 hexadecimal"),
        ({"acme": {"api_key": "", "index": "x"}}, "is empty"),
        ({"acme": {"api_key": " " * 20, "index": "x"}}, "is empty"),
        ({"acme": {"api_key": "é" * 20, "index": "x"}}, "beyond ASCII"),
        ({"acme": {"api_key_sha256": digest_of(""), "index": "x"}}, "everybody knows"),
        ({"acme": {"api_key_sha256": digest_of("test"), "index": "x"}}, "everybody knows"),
        ({"acme": {"api_key": "operators-own-key", "index": "x"}}, "is also the key of tenant acme"),
        ('{"acme": {}, "acme": {}}', "'acme' stands twice"),
        ({"acme": {"api_key": KEY}}, "index must be a folder"),
        ({"acme": {"api_key": KEY, "index": "x", "salt": "y"}}, "unknown fields salt"),
        ({"acme": {"api_key": KEY, "index": "x", "automatic": "yes"}}, "give true or false"),
        ({"a": {"api_key": KEY, "index": "x"}, "b": {"api_key": KEY, "index": "y"}}, "key of another"),
        ({"a": {"api_key": KEY, "index": "x"}, "b": {"api_key": KEY + "2", "index": "x"}}, "share the index"),
    ],
)  # fmt: skip
def test_faults_of_a_tenants_file_are_one_line(tmp_path: Path, content: Any, line: str) -> None:
    with pytest.raises(RagPipelineError, match=line) as error:
        load(tmp_path, content)
    assert "\n" not in str(error.value)


def test_a_tenant_shares_no_index_and_no_namespace_with_the_operator(tmp_path: Path) -> None:
    with pytest.raises(RagPipelineError, match="operator and acme share the index"):
        load(tmp_path, {"acme": {"api_key": KEY, "index": str(tmp_path / "main")}})
    tenants = load(tmp_path, {"acme": {"api_key": KEY, "index": "x"}})
    acme = tenants.of(KEY)
    assert acme is not None
    assert acme.name == "acme"
    assert acme.salt.startswith("tenant-")
    assert tenants.of("operators-own-key") is tenants.operator
    # Whoever brings no key, or another, is nobody: not the operator.
    assert tenants.of("another key") is tenants.of(None) is tenants.of("") is None
    assert Tenants({}).of(None).name == "operator"  # type: ignore[union-attr]


def test_a_digest_of_a_short_key_opens_nothing(tmp_path: Path) -> None:
    """How long the key behind a digest is, is only seen when somebody brings it."""
    hashed = {"a": {"api_key_sha256": digest_of("short"), "index": "x"},
              "b": {"api_key_sha256": digest_of(KEY), "index": "y"}}  # fmt: skip
    tenants = load(tmp_path, hashed)
    assert tenants.of("short") is None
    assert tenants.of(KEY).name == "b"  # type: ignore[union-attr]


def test_the_documented_digest_is_of_no_word() -> None:
    text = (Path(__file__).parents[2] / "docs" / "security.md").read_text("utf-8")
    shown = set(re.findall(r"[0-9a-f]{64}", text))
    assert shown
    assert not shown & EVERYBODYS_DIGESTS


@pytest.mark.parametrize("key", ["", " ", "\t", "é", "two words"])
def test_a_key_that_is_none_is_an_error_wherever_it_comes_from(
    tmp_path: Path, key: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "key"
    file.write_text(key)
    for name in ("api-key", "admin-api-key"):
        variable = f"RAG_PIPELINE_{name.upper().replace('-', '_')}"
        for words, environment in (
            ([f"--{name}", key], {}),
            ([f"--{name}={key}"], {}),
            ([f"--{name}-file", str(file)], {}),
            ([], {variable: key}),
        ):
            with monkeypatch.context() as patch:
                for given, value in environment.items():
                    patch.setenv(given, value)
                assert main(["serve", "--index", "/x", *words]) == 1
                said = capsys.readouterr().err.strip().splitlines()
                assert said[-1].startswith("error: ")
                assert f"--{name}" in said[-1] or variable in said[-1]


def test_an_empty_name_of_a_key_file_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "--index", "/x", "--api-key-file", ""]) == 1
    assert "cannot be read" in capsys.readouterr().err
    monkeypatch.setenv("RAG_PIPELINE_SERVE_API_KEY_FILE", "")
    assert main(["serve", "--index", "/x"]) == 1
    assert "RAG_PIPELINE_SERVE_API_KEY_FILE is empty" in capsys.readouterr().err


def test_keys_come_from_one_place_and_leave_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(**given: Any) -> str | None:
        return read_key(
            **{"flag": "--api-key", "given": None, "file": None, "variable": "SOME_KEY"} | given
        )

    (tmp_path / "key").write_text(f"{KEY}\n")
    assert read() is None
    assert read(given=KEY) == read(file=tmp_path / "key") == KEY
    monkeypatch.setenv("SOME_KEY", KEY)
    assert read() == KEY
    assert "SOME_KEY" not in os.environ
    with pytest.raises(RagPipelineError, match="both give a key"):
        read(given=KEY, file=tmp_path / "key")
    (tmp_path / "key").write_text(f"{KEY}\nsecond\n")
    with pytest.raises(RagPipelineError, match="one key"):
        read(file=tmp_path / "key")


@pytest.mark.parametrize(
    ("flag", "acme", "everybody", "single"),
    [
        (None, None, False, []),
        (None, True, False, ["acme"]),
        (True, None, True, []),
        (True, True, True, []),
        (True, False, False, ["operator", "other"]),
        (False, True, False, ["acme"]),
    ],
)
def test_each_tenant_says_whether_its_prompts_are_matched_unasked(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flag: bool | None,
    acme: bool | None,
    everybody: bool,
    single: list[str],
) -> None:
    from rag_pipeline.cli.serve import _choose_automatic
    from rag_pipeline.sglang_plugin import FUSION_VARIABLE, FusionConfig

    choice = {} if acme is None else {"automatic": acme}
    content = {
        "acme": {"api_key": KEY, "index": "x", **choice},
        "other": {"api_key": KEY[::-1], "index": "y"},
    }
    tenants = load(tmp_path, content)
    monkeypatch.setenv(FUSION_VARIABLE, '{"min_reused_tokens": 9}')
    _choose_automatic(tenants, flag)
    told = FusionConfig.from_env()
    assert (told.automatic, told.min_reused_tokens) == (everybody, 9)
    salts = {tenant.name: tenant.salt for tenant in tenants.all()}
    assert sorted(told.automatic_tenants) == sorted(salts[name] for name in single)


def test_index_options() -> None:
    found = parse_indexes(["/data/My Notes", "law=/data/l"])
    assert list(found) == ["my-notes", "law"]
    assert found["law"] == Path("/data/l")
    for wrong, line in (
        ([], "missing"),
        (["a=x", "a=y"], "given twice"),
        (["A B=x"], "not a name"),
    ):
        with pytest.raises(RagPipelineError, match=line):
            parse_indexes(wrong)


# -- prompts, segments, attribution -------------------------------------------------------------


def test_a_conversation_stands_behind_the_chunks() -> None:
    plain = read_conversation([Message(role="user", content=" Why? ")])
    assert plain.query == "Why?"
    assert plain.question.startswith("Question: Why?")
    talk = read_conversation(
        [
            Message(role="system", content="Answer in French."),
            Message(role="user", content="Who?"),
            Message(role="assistant", content="He."),
            Message(role="user", content=[{"type": "text", "text": "And why?"}]),
        ]
    )
    assert talk.query == "And why?"
    assert talk.question.startswith("Answer in French.\n\n")
    assert "User: Who?\nAssistant: He." in talk.question
    assert talk.question.endswith("Question: And why?")


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


# -- requests -----------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["serve"], "Missing option '--index'"),
        (["serve", "--index", "Bad Name=/x"], "is not a name"),
        (["serve", "--index", "/x", "--policy", "nonsense"], "policy 'nonsense' is unknown"),
        (["serve", "--index", "/x", "--search", "psychic"], "--search is 'psychic'"),
        (["serve", "--index", "/x", "--tenants", "/none.json"], "cannot be read"),
        (["serve", "--index", "/x", "--model-path", "/y"], "--model-path is not taken here; use --model"),
        (["serve", "--index", "/x", "--port", "0"], "Invalid value for '--port'"),
        (["serve", "--index", "/x", "stray"], "'stray' is not a flag"),
        (["serve", "--index", "/x", "--host", "0.0.0.0"], "accept it with --unprotected-without-key"),
        (["serve", "--index", "/x", "--host", "127.evil.example"], "--unprotected-without-key"),
    ],
)  # fmt: skip
def test_serve_refuses_in_one_line_before_anything_starts(
    words: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) in (1, 2)
    said = capsys.readouterr().err.strip().splitlines()
    assert line in said[-1]
    assert said[-1].startswith("error: ")


def test_tenants_need_an_operators_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.json").write_text(json.dumps({"acme": {"api_key": KEY, "index": "x"}}))
    assert main(["serve", "--index", "/x", "--tenants", str(tmp_path / "t.json")]) == 1
    assert "give --api-key too" in capsys.readouterr().err
