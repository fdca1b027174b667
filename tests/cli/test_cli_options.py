"""The command line's surface: what it accepts, and how it says no."""

from __future__ import annotations

import pytest

from rag_pipeline.cli import main
from rag_pipeline.cli.app import app

CONTRACT = {"demo", "ingest", "ask", "doctor", "eval", "bench"}


def test_commands_of_the_contract_exist() -> None:
    names = {command.name or command.callback.__name__ for command in app.registered_commands}
    assert names >= CONTRACT


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--bogus"], "--bogus"),
        (["nope"], "nope"),
        (["ask"], "question"),
        (["ask", "why?"], "--index"),
        (["ask", "why?", "--index", "x", "--top-k", "0"], "--top-k"),
        (["ask", "why?", "--index", "x", "--top-k", "three"], "--top-k"),
        (["ingest", "--index", "x"], "paths"),
        (["ingest", "p", "--index", "x", "--chunk-tokens", "1"], "--chunk-tokens"),
        (["doctor", "--bogus"], "--bogus"),
        (["eval", "--bogus"], "--dataset"),
        (["eval", "--dataset", "d", "--out", "o", "--bogus"], "--bogus"),
        (["bench", "ttft", "--bogus"], "--bogus"),
        (["cache", "evict"], "--key"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    words: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert named in captured.err
    assert "--help" in captured.err


@pytest.mark.parametrize(
    "words", [[], ["--help"], ["-h"], ["ask", "-h"], ["--version"], ["eval", "-h"]]
)
def test_help_and_version_succeed(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    assert capsys.readouterr().out
