"""Every benchmark says no to a mistake in one line; the store's runs small and whole."""

from __future__ import annotations

import json
import os
import pkgutil
import re
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib import import_module
from typing import Any

import pytest

import rag_eval.benchmarks
from rag_eval.arguments import add_engine_option, require_at_least
from rag_eval.benchmarks import store
from rag_eval.benchmarks.call_timer import CallTimer
from rag_eval.benchmarks.frame import (
    benchmark_parser,
    keep_measured,
    run_benchmark,
    time_in_turns,
)
from rag_eval.errors import EvalError
from rag_pipeline import interrupts

COMMANDS = [
    found.name
    for found in pkgutil.iter_modules(rag_eval.benchmarks.__path__)
    if hasattr(import_module(f"rag_eval.benchmarks.{found.name}"), "main")
]
CONFIGURED = {
    "ttft": "model chunks chunk-tokens lengths question-tokens modes repeats seed",
    "throughput": "model rates requests corpus chunks chunk-tokens zipf output-tokens seed url",
    "kernels": "system-tokens chunks q-heads dtype threads",
    "router": "topics pool policy seed",
    "planning": "stored policies repeats",
    "overhead": "model repeats chunks new-tokens",
    "tiers": "model chunks chunk-tokens mode repeats records trace parts seed",
}
"""Options of benchmarks, some of each."""
SMALL = ["--chunks", "40", "--chunk-tokens", "128", "--prompt-tokens", "800", "--repeats", "12"]
SMALL += ["--layers", "2", "--records", "4"]


def test_no_command_is_missed() -> None:
    assert {"store", "ttft", "throughput", "load", "retrieval", "planning"} <= set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_an_unknown_option_is_one_line(name: str, refusal: Callable[..., str]) -> None:
    line = refusal(import_module(f"rag_eval.benchmarks.{name}").main, ["--bogus", "1"])
    assert "--help` lists what is allowed" in line


@pytest.mark.parametrize("name", CONFIGURED)
def test_every_field_of_a_config_has_an_option_with_its_default(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        import_module(f"rag_eval.benchmarks.{name}").main(["--help"])
    assert stop.value.code == 0
    options = capsys.readouterr().out.partition("options:")[2]
    told = {block.split()[0]: block for block in re.split(r"\n  (?=--)", options) if block.strip()}
    for option in CONFIGURED[name].split():
        assert "(default:" in " ".join(told[f"--{option}"].split()), option
    assert "--json" in told


ENDS: dict[str, BaseException] = {
    "refused": EvalError("the text is\ntoo short"),
    "broken": RuntimeError("nobody saw this coming"),
    "stopped": KeyboardInterrupt(),
}
"""How the toy benchmark ends behind its first step."""


@dataclass(frozen=True, kw_only=True)
class Inner:
    size: int = 3
    """How large."""
    share: float | None = None


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: str = "n"
    """What it is called."""
    inner: Inner = Inner()
    count: int = 2
    engine_args: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require_at_least(self, 1, "count")


def measure(config: Outer, progress: Callable[[str], None]) -> dict[str, Any]:
    progress("measuring")
    if config.name == "interrupted":
        raise KeyboardInterrupt
    if config.name == "twice":
        # As `timeout -s INT` does it: the process, then its group, while the engine is being closed.
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)
        except KeyboardInterrupt:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
    if config.name == "absent":
        raise EvalError("name is absent; take another")
    if config.name in ENDS:
        done: list[int] = []
        with keep_measured(lambda: done) as end:
            for number in range(config.count):
                done.append(number)
                raise ENDS[config.name]
        return {"n": len(done)} | end.report()
    return {"n": config.count, "of": asdict(config), "interrupted": config.name in ("cut", "twice")}


def command(*words: str) -> int:
    parser = benchmark_parser("bench toy", "A toy.\n\nMore of it.")
    add_engine_option(parser)
    return run_benchmark(parser, Outer, measure, lambda report: f"table {report['n']}", words)


def test_a_benchmark_brings_its_measuring_alone(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--size", "5", "--share", "0.5", "--count", "4", "--engine-arg", "page_size=16"]
    assert command(*words, "--json") == 0
    said = capsys.readouterr()
    assert said.err == "measuring\n"
    inner = {"size": 5, "share": 0.5}
    made = {"name": "n", "inner": inner, "count": 4, "engine_args": {"page_size": 16}}
    assert json.loads(said.out) == {"n": 4, "of": made, "interrupted": False}
    assert command() == 0
    assert capsys.readouterr().out == "table 2\n"
    assert command("--name", "cut") == 130
    assert "table 2" in capsys.readouterr().out
    assert command("--name", "absent") == 1
    assert capsys.readouterr().err.endswith("error: name is absent; take another\n")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--count", "0"], "count is 0; it must be 1 or more"),
        (["--share", "much"], "share"),
        (["--engine-arg", "x"], "NAME=JSON"),
    ],
)
def test_a_benchmark_that_is_told_nonsense_says_so_in_one_line(
    words: list[str], named: str, refusal: Callable[..., str]
) -> None:
    assert named in refusal(lambda given: command(*given), words)


@pytest.mark.parametrize("name", ["twice", "interrupted"])
def test_an_interrupted_benchmark_says_so_in_one_line_behind_what_it_has(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interrupts, "_last", float("-inf"))
    before = signal.getsignal(signal.SIGINT)
    assert command("--name", name) == 130
    said = capsys.readouterr()
    assert said.out == ("table 2\n" if name == "twice" else "")
    assert said.err.count("error: interrupted; ") == said.err.count("\n") - 1 == 1
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    ("name", "line", "code"),
    [
        ("refused", "error: the text is too short; what was measured until then is printed", 1),
        ("broken", "error: nobody saw this coming; what was measured until then is printed", 1),
        ("stopped", "error: interrupted; what was measured until then is printed", 130),
    ],
)
def test_what_was_measured_is_printed_however_a_run_ends(
    name: str, line: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("--name", name, "--json") == code
    said = capsys.readouterr()
    report = json.loads(said.out)
    assert report["n"] == 1
    assert report["interrupted"] is (code == 130)
    assert bool(report.get("failure")) is (code == 1)
    assert said.err.endswith(line + "\n")
    assert ("Traceback" in said.err) is (name == "broken")


@pytest.mark.parametrize("kind", [KeyboardInterrupt, EvalError, RuntimeError])
def test_with_nothing_measured_there_is_no_report(kind: type[BaseException]) -> None:
    with pytest.raises(kind, match="so"), keep_measured(lambda: []):
        raise kind("so")


@pytest.mark.parametrize("name", ["twice", "interrupted"])
def test_the_command_line_adds_no_second_line(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from rag_pipeline.cli import main

    monkeypatch.setattr(interrupts, "_last", float("-inf"))
    monkeypatch.setattr("rag_eval.benchmarks.ttft.main", lambda words: command("--name", name))
    assert main(["bench", "ttft"]) == 130
    assert capsys.readouterr().err.count("error: ") == 1


def test_calls_are_timed_in_turns_behind_a_warm_up() -> None:
    seen: list[str] = []
    calls = {name: partial(seen.append, name) for name in "ab"}
    timers = time_in_turns(calls, 3)
    assert "".join(seen) == "ba" + "ab" + "ba" + "ab"
    assert {name: timer.report("n") for name, timer in timers.items()} == {
        "a": {"n": 3},
        "b": {"n": 3},
    }


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
    words: list[str], named: str, refusal: Callable[..., str]
) -> None:
    assert named in refusal(store.main, words)


def test_the_timer_counts_calls_and_sums() -> None:
    timer = CallTimer()
    assert timer(divmod, 7, 2) == (3, 1)
    timer.note(0.25, 0.125)
    report: dict[str, Any] = timer.report()
    assert report["n"] == 2
    assert (report["wall_ms_max"], report["cpu_ms_max"]) == (250.0, 125.0)
    assert report["wall_ms_min"] < report["wall_ms_p50"] == pytest.approx(125, rel=0.1)
