"""The command line's surface: what it accepts, and how it says no."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from rag_pipeline.cli import main
from rag_pipeline.cli.app import app

CONTRACT = {"demo", "ingest", "ask", "doctor", "eval", "bench", "simulate"}


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
        (["simulate", "tiers", "--trace", "zipf", "--bogus"], "--bogus"),
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


@pytest.mark.parametrize("words", [["--verbose", "--version"], ["--version", "--verbose"]])
def test_verbose_stands_before_or_behind_and_lets_the_engine_speak(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rag_pipeline.config import VERBOSE_VARIABLE
    from rag_pipeline.sglang_plugin.launch.startup import log_level

    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setenv(VERBOSE_VARIABLE, "")
    assert log_level() == "error"
    assert main(words) == 0
    assert "TQDM_DISABLE" not in os.environ
    assert log_level() == "info"
    assert capsys.readouterr().out.startswith("rag-pipeline ")


@pytest.mark.parametrize(("value", "bars"), [("1", 0), ("", 1)])
def test_a_bar_that_insists_is_hidden_where_bars_are_off(value: str, bars: int) -> None:
    """SGLang's loaders say ``disable=False``, which tqdm prefers to its environment variable."""
    code = (
        "from rag_pipeline.sglang_plugin.launch import noise\n"
        "noise.hide_bars(); noise.hide_bars()\n"
        "from tqdm.auto import tqdm\n"
        "assert list(tqdm([1, 2], desc='shards', disable=False)) == [1, 2]\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TQDM_DISABLE": value},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ("shards" in done.stderr) == bool(bars)
