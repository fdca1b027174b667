"""A chat's lines, commands, transcript and refusals, without an engine; and a whole one through a pipe."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rag_pipeline.cli import main
from rag_pipeline.cli.chat import _converse
from rag_pipeline.cli.chat_lines import COMMANDS, read_messages
from rag_pipeline.cli.transcript import Transcript
from rag_pipeline.errors import RagPipelineError
from rag_pipeline.protocol import Usage


class Session:
    """A model that says what it was told, backwards."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.num_turns = 0
        self.last: Any = None
        self.cleared = 0

    def ask(self, text: str) -> Any:
        if text == "too long":
            raise RagPipelineError("the message does not fit: shorten it")
        self.asked.append(text)
        yield from text[::-1]
        from rag_pipeline.chat_session import FinishedTurn

        self.num_turns += 1
        usage = Usage(
            prompt_tokens=3,
            exact_prefix_tokens=0,
            reused_tokens=0,
            recomputed_tokens=0,
            fresh_tokens=3,
            completion_tokens=2,
        )
        self.last = FinishedTurn(
            text=text[::-1], usage=usage, finish_reason="stop", memory={"loaded": 7}
        )

    def clear(self) -> None:
        self.cleared += 1

    def memory_facts(self) -> dict[str, Any]:
        return {"method": "epicache", "answers": self.num_turns}


def typed(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("a\n\n  b \n", ["a", "b"]),
        ('"""one\ntwo"""\nthree', ["one\ntwo", "three"]),
        ('"""\none\n\ntwo\n"""\n', ["one\n\ntwo"]),
        ('"""all of it"""', ["all of it"]),
        ('"""never ended\nso far', ["never ended\nso far"]),
        ("", []),
    ],
)
def test_messages_are_lines_or_stand_between_three_quotes(
    text: str, messages: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    typed(monkeypatch, text)
    assert list(read_messages()) == messages


def test_a_byte_that_is_no_utf8_is_one_character_of_a_message(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\nb\n"), "utf-8"))
    assert list(read_messages()) == ["caf\N{REPLACEMENT CHARACTER}", "b"]


def test_each_turn_is_one_object_and_commands_are_no_turns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    typed(monkeypatch, "abc\n/memory\n/nonsense\n/clear\n/help\nxyz\n/quit\nnot asked\n")
    session, transcript = Session(), Transcript(tmp_path / "t.jsonl")
    _converse(session, transcript, json_output=True)  # type: ignore[arg-type]
    captured = capsys.readouterr()
    first, facts, second = map(json.loads, captured.out.splitlines())
    assert (first["turn"], first["question"], first["answer"]) == (1, "abc", "cba")
    assert first["usage"]["prompt_tokens"] == 3
    assert first["memory"] == {"loaded": 7}
    assert facts == {"memory": {"method": "epicache", "answers": 1}}
    assert second["answer"] == "zyx"
    assert session.asked == ["abc", "xyz"]
    assert session.cleared == 1
    assert f"/nonsense is no command; allowed are {', '.join(COMMANDS)}" in captured.err
    kept = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    assert [said["content"] for said in kept] == ["abc", "cba", "xyz", "zyx"]


def test_answers_through_a_pipe_are_lines_and_a_message_that_does_not_fit_ends_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed(monkeypatch, "abc\ntoo long\nxyz\n")
    session = Session()
    with pytest.raises(RagPipelineError, match="does not fit"):
        _converse(session, None, json_output=False)  # type: ignore[arg-type]
    assert capsys.readouterr().out == "cba\n"
    assert session.asked == ["abc"]


def test_a_transcript_is_read_back_and_gone_on_with(tmp_path: Path) -> None:
    file = tmp_path / "chat.jsonl"
    new = Transcript(file)
    assert (new.system, new.messages) == ("", [])
    new.append([("system", "Be brief.")])
    new.append([("user", "line\u2028one\ntwo"), ("assistant", "\N{GRINNING FACE}")])
    again = Transcript(file)
    assert again.system == "Be brief."
    assert again.messages == [("user", "line\u2028one\ntwo"), ("assistant", "\N{GRINNING FACE}")]
    again.append([("user", "half \ud83d")])  # typed as bytes that are no UTF-8
    assert Transcript(file).messages[-1] == ("user", "half \ufffd")
    # What another program left without an end of line is a line all the same.
    file.write_text('{"role": "user", "content": "a"}')
    Transcript(file).append([("assistant", "b")])
    assert Transcript(file).messages == [("user", "a"), ("assistant", "b")]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('{"role": "user", "content": "a"}\n{"role": "us', "line 2: no JSON"),
        ("[" * 100_000, "line 1: no JSON"),
        ("[]", "line 1: no message with a role"),
        ('{"role": "tool", "content": "a"}', "system, user, assistant"),
        ('{"role": "user", "content": ["a"]}', "content is no text"),
        (
            '{"role": "user", "content": "a"}\n{"role": "system", "content": "b"}',
            "line 2: a system message behind others",
        ),
        (b"\xff\xfe", "not UTF-8"),
    ],
)
def test_a_transcript_that_is_none_is_refused_before_a_model_is_looked_for(
    text: str | bytes, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "chat.jsonl"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert main(["chat", "--model", "no-such-model", "--history", str(file)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert named in error


@pytest.mark.parametrize(
    ("words", "named", "code"),
    [
        (["--memory", "elephant"], "elephant", 1),
        (["--memory", "epicache:x=1"], "has no option 'x'", 1),
        (["--memory", "epicache", "--budget", "3"], "memory budget_tokens is 3", 1),
        (["--memory", "epicache", "--episodes", "1000"], "memory episodes is 1000", 1),
        (["--budget", "0"], "--budget", 2),
        (["--budget", "64"], "--memory-budget is 64 and --memory is off; give --memory", 1),
        (["--memory", "off", "--memory-episodes", "2"], "leave --memory-episodes out", 1),
        (["--memory-block", "512"], "--memory-block is 512", 1),
        (["--history", "/no/such/folder/f"], "--history /no/such/folder/f", 1),
        (["--max-new-tokens", "0"], "--max-new-tokens", 2),
    ],
)
def test_what_a_chat_cannot_be_is_one_line(
    words: list[str], named: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["chat", "--model", "no-such-model", *words]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert named in captured.err


@pytest.mark.engine
def test_a_chat_through_a_server_is_answered_from_a_memory_and_goes_on(
    model_server: str,
    smollm2_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Any SGLang server with the plugin will do: the prompts are laid out here."""
    file = tmp_path / "chat.jsonl"
    words = ["chat", "--model", str(smollm2_path), "--server", model_server, "--json"]
    words += ["--memory", "epicache", "--budget", "64", "--memory-block", "32", "--episodes", "1"]
    words += ["--max-new-tokens", "8", "--history", str(file), "--system", "Be brief."]
    said = "".join(
        f"Note {turn}: the tower number {turn} was built of blue stone.\n" for turn in range(9)
    )
    typed(monkeypatch, f"{said}/memory\n")
    assert main(words) == 0
    *turns, facts = map(json.loads, capsys.readouterr().out.splitlines())
    assert [turn["turn"] for turn in turns] == list(range(1, 10))
    assert turns[0]["memory"] == {}
    assert turns[-1]["memory"]["loaded"] == 32
    assert max(turn["usage"]["prompt_tokens"] for turn in turns) < 64 + 2 * 32 + 60
    assert facts["memory"]["build_steps"] > 0
    # Another run goes on where this one ended.
    typed(monkeypatch, "What was built of blue stone?\n")
    assert main(words) == 0
    (turn,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert turn["memory"]["loaded"] == 32
    assert len(Transcript(file).messages) == 20


@pytest.mark.engine
def test_an_interrupted_chat_ends_in_one_line(
    model_server: str, smollm2_path: Path, tmp_path: Path
) -> None:
    words = [
        sys.executable,
        "-c",
        "import sys; from rag_pipeline.cli import main; sys.exit(main())",
    ]
    words += ["chat", "--model", str(smollm2_path), "--server", model_server, "--json"]
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.write("Hello\n")
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["turn"] == 1
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        errors = process.stderr.read().splitlines()
    assert errors[-1] == "error: interrupted; what was already written is kept"
    assert not any(line.startswith("Traceback") for line in errors)
