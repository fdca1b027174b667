"""Every benchmark says no to a mistake in one line; the store's runs small and whole."""

from __future__ import annotations

import json
import pkgutil
from importlib import import_module
from typing import Any

import pytest

import rag_eval.benchmarks
from rag_eval.benchmarks import store
from rag_eval.benchmarks.call_timer import CallTimer

COMMANDS = [
    found.name
    for found in pkgutil.iter_modules(rag_eval.benchmarks.__path__)
    if hasattr(import_module(f"rag_eval.benchmarks.{found.name}"), "main")
]
SMALL = ["--chunks", "40", "--chunk-tokens", "128", "--prompt-tokens", "800", "--repeats", "12"]
SMALL += ["--layers", "2", "--records", "4"]


def test_no_command_is_missed() -> None:
    assert {"store", "ttft", "throughput", "load", "retrieval", "planning"} <= set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_an_unknown_option_is_one_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        import_module(f"rag_eval.benchmarks.{name}").main(["--bogus", "1"])
    assert stop.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert said.err.startswith("error: ")
    assert "--help` lists what is allowed" in said.err


def test_the_store_is_timed_in_every_way(capsys: pytest.CaptureFixture[str]) -> None:
    assert store.main([*SMALL, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    kinds = {name: row for name, row in report.items() if isinstance(row, dict) and "n" in row}
    timed = {"match", "match_fresh", "match_boiler_plate", "match_one_token", "add", "remove"}
    assert set(kinds) == timed | {"save", "load", "checksum", "evict"}
    assert (kinds["match"]["n"], kinds["add"]["n"], kinds["remove"]["n"]) == (12, 40, 20)
    # Four records fit: from the fifth on every commit pushes one out.
    assert kinds["evict"]["n"] == 12 - 4
    assert report["record_bytes"] > 2 * 2 * 128 * 3 * 64 * 2
    assert store.main(SMALL) == 0
    assert "index" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "named"), [(["--repeats", "0"], "repeats"), (["--chunk-tokens", "9"], "chunk-tokens")]
)
def test_a_store_of_no_size_is_one_line(
    words: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        store.main(words)
    assert stop.value.code == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert named in line


def test_the_timer_counts_calls_and_sums() -> None:
    timer = CallTimer()
    assert timer(divmod, 7, 2) == (3, 1)
    timer.note(0.25, 0.125)
    report: dict[str, Any] = timer.report()
    assert report["n"] == 2
    assert (report["wall_ms_max"], report["cpu_ms_max"]) == (250.0, 125.0)
    assert report["wall_ms_min"] < report["wall_ms_p50"] == pytest.approx(125, rel=0.1)
