"""Throughput on a real HTTP server with a tiny model, and the stream of prompts it is fed."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from warm import WarmProcess, WarmStart

from rag_eval import EvalError
from rag_eval.benchmarks import throughput
from rag_eval.benchmarks.local_server import local_server
from rag_eval.benchmarks.throughput import ThroughputConfig
from rag_eval.benchmarks.workload import WorkloadConfig, make_workload
from rag_pipeline.errors import EngineError

SHAPE = WorkloadConfig(requests=12, corpus=6, chunks=3, chunk_tokens=48, seed=3)


def test_chunks_recur_by_popularity_and_questions_do_not(prompt_maker: Any) -> None:
    shape = WorkloadConfig(requests=200, corpus=20, chunks=4, chunk_tokens=32, zipf=1.2)
    made = make_workload(shape, prompt_maker)
    again = make_workload(shape, prompt_maker)
    assert made == again
    ranks = {chunk.ids: rank for rank, chunk in enumerate(made.corpus.chunks)}
    assert len(ranks) == 20
    seen = Counter(ranks[chunk.ids] for prompt in made.prompts for chunk in prompt.chunks)
    assert seen[0] > 2 * seen[5] > 0
    assert all(len({chunk.ids for chunk in prompt.chunks}) == 4 for prompt in made.prompts)
    assert len({prompt.suffix_ids for prompt in made.prompts}) == 200


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rates": "fast"}, "rates"),
        ({"rates": "0,1"}, "rates"),
        ({"rates": "1,nan"}, "rates"),
        ({"ttft_bound_s": 0.0}, "ttft_bound_s"),
        ({"output_tokens": 0}, "output_tokens"),
        ({"url": "http://x", "engine_args": {"a": 1}}, "--url"),
    ],
)
def test_a_bad_setting_is_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(EvalError, match=named):
        ThroughputConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"corpus": 2}, "corpus"), ({"zipf": -1.0}, "zipf"), ({"chunks": 0}, "ch")],
)
def test_a_bad_shape_is_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(EvalError, match=named):
        WorkloadConfig(**changes)


@pytest.fixture
def starts_warm(warm_start: WarmStart, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same server, without its imports."""

    def start(words: list[str], environment: dict[str, str], log: Path) -> WarmProcess:
        return warm_start.popen(words, environment=environment, stdout=log)

    monkeypatch.setattr("rag_eval.benchmarks.local_server._start", start)


@pytest.mark.usefixtures("starts_warm")
def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    with (
        pytest.raises(EngineError, match="ended before it was ready") as caught,
        local_server(tmp_path, {"no_such_argument": 1}),
    ):
        pass
    assert "no-such-argument" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_process_that_ends_at_once_is_quoted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Started as a user's server is: in a group of its own, with the variables, its words kept."""
    code = "import os; print('one'); print(os.getpgid(0) == os.getpid(), os.environ['MINE'], 1)"
    program = [sys.executable, "-c", code]
    monkeypatch.setattr("rag_eval.benchmarks.local_server._command", lambda *_: program)
    with (
        pytest.raises(EngineError, match=r"before it was ready: True here 1$"),
        local_server(tmp_path, {}, {"MINE": "here"}),
    ):
        pass


@pytest.mark.engine
@pytest.mark.usefixtures("starts_warm")
def test_modes_are_driven_on_one_server_and_the_command_uses_a_running_one(
    tiny_path: Path,
    capsys: pytest.CaptureFixture[str],
    interrupt_at: Callable[[str], Callable[[str], None]],
) -> None:
    with local_server(tiny_path, {"max_total_tokens": 8192}) as server:
        config = ThroughputConfig(
            model=str(tiny_path),
            modes="prefix,query:0.15",
            rates="10,1000000",
            workload=SHAPE,
            output_tokens=4,
            ttft_bound_s=1000.0,
            url=server.url,
        )
        before = server.cpu_seconds()
        report = throughput.run(config)
        assert server.cpu_seconds() > before
        words = ["--model", str(tiny_path), "--url", server.url, "--modes", "epic:0.2"]
        words += ["--rates", "50", "--requests", "3", "--corpus", "4", "--chunks", "2"]
        assert throughput.main([*words, "--chunk-tokens", "32", "--output-tokens", "2"]) == 0
        assert "goodput" in capsys.readouterr().out
        with pytest.raises(KeyboardInterrupt):
            throughput.run(config, interrupt_at("chunks computed"))
        broken_off = throughput.run(config, interrupt_at("prefix at 10/s"))
        # A mode that reuses nothing here: chunks of fewer tokens than fusion takes on.
        words[words.index("--requests") + 1] = "1"
        assert throughput.main([*words, "--chunk-tokens", "1", "--chunks", "1"]) == 1
        assert "epic:0.2" in capsys.readouterr().err
    assert broken_off["interrupted"] is True
    assert [(run["mode"], run["rate"]) for run in broken_off["runs"]] == [("prefix", 10.0)]
    assert broken_off["modes"]["prefix"]["best_goodput_per_s"] > 0
    assert broken_off["modes"]["query:0.15"]["best_goodput_per_s"] is None
    assert "prefix" in throughput.table(broken_off)
    json.dumps(broken_off, allow_nan=False)
    assert report["interrupted"] is False
    json.dumps(report, allow_nan=False)
    assert report["warm"]["chunks"] == SHAPE.corpus
    assert report["modes"]["query:0.15"]["computed_fraction"] < 1
    rows = {(run["mode"], run["rate"]): run for run in report["runs"]}
    assert {("prefix", 10.0), ("query:0.15", 10.0)} <= set(rows)
    for run in report["runs"]:
        assert (run["n"], run["failed"]) == (SHAPE.requests, 0)
        assert run["within_bound"] == 1.0
        assert run["goodput_per_s"] == pytest.approx(run["requests_per_s"], rel=1e-3)
        assert run["output_tokens_per_s"] == pytest.approx(4 * run["requests_per_s"], rel=1e-3)
        assert 0 < run["ttft_p50_s"] <= run["ttft_p99_s"]
        assert run["cpu_s"] is None
    # Twelve prompts within microseconds: none can be answered before the last one is sent.
    assert all(run["saturated"] for run in report["runs"] if run["rate"] == 1e6)
    assert report["modes"]["prefix"]["saturated_at"] in (10.0, 1e6)
    assert set(report["modes"]) == {"prefix", "query:0.15"}
    assert report["modes"]["prefix"]["goodput_vs_prefix"] == 1.0
