"""Time to first token over prompt length: exact lengths, bad input, and a run on a tiny engine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rag_eval import EvalError
from rag_eval.benchmarks import ttft
from rag_eval.benchmarks.ttft import TtftConfig
from rag_eval.benchmarks.ttft_plot import plot_ttft
from rag_eval.benchmarks.ttft_prompts import Point, make_prompts


def test_points_are_lengths_times_numbers_of_chunks() -> None:
    assert TtftConfig().points() == (Point(chunks=6, chunk_tokens=400),)
    assert TtftConfig(chunks="2,4", chunk_tokens=50).points() == (
        Point(chunks=2, chunk_tokens=50),
        Point(chunks=4, chunk_tokens=50),
    )
    grown = TtftConfig(lengths="4000,1000", chunk_tokens=500).points()
    assert [(point.length, point.chunks) for point in grown] == [(1000, 2), (4000, 8)]
    assert len(TtftConfig(lengths="1000,2000", chunks="4,8").points()) == 4


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"lengths": "long"}, "lengths"),
        ({"lengths": "0"}, "lengths"),
        ({"chunks": "-2"}, "chunks"),
        ({"chunks": ""}, "chunks"),
        ({"repeats": 0}, "repeats"),
    ],
)
def test_a_bad_setting_is_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(EvalError, match=named):
        TtftConfig(**changes)


@pytest.mark.parametrize(
    "config",
    [
        TtftConfig(lengths="500,1003", chunks="3,7"),
        TtftConfig(lengths="1000,2000,4000,8000"),
    ],
)
def test_a_fixed_length_is_reached_to_the_token(prompt_maker: Any, config: TtftConfig) -> None:
    for point in config.points():
        seen, asked = make_prompts(point, prompt_maker, question_tokens=24, seed=0)
        assert len(asked.input_ids) == len(seen.input_ids) == point.length
        assert len(asked.chunks) == point.chunks
        assert asked.chunks[0] == seen.chunks[-1]
        sizes = [len(chunk.ids) for chunk in asked.chunks]
        assert max(sizes) - min(sizes) <= 1
    with pytest.raises(EvalError, match="longer prompts or fewer chunks"):
        make_prompts(
            Point(chunks=50, chunk_tokens=1, length=80), prompt_maker, question_tokens=24, seed=0
        )


@pytest.mark.engine
def test_every_mode_is_timed_at_every_length(
    tiny_session: Any, tiny_path: Path, tmp_path: Path
) -> None:
    config = TtftConfig(
        model=str(tiny_path), lengths="200,300", chunks="3", modes="query:0.15", repeats=2, seed=9
    )
    report = ttft.run(config, session=tiny_session)
    json.dumps(report, allow_nan=False)
    assert [point["prompt_tokens"] for point in report["points"]] == [200, 300]
    for point in report["points"]:
        prefix, query = point["modes"]["prefix"], point["modes"]["query:0.15"]
        assert prefix["n"] == query["n"] == 2
        assert prefix["speedup_vs_prefix"] == 1.0
        assert query["reused_tokens"] > prefix["reused_tokens"] == 0
        assert query["computed_fraction"] < prefix["computed_fraction"]
    assert "modes" not in report
    assert "300" in ttft.table(report)
    assert report["interrupted"] is False
    plot_ttft(report, tmp_path / "deep" / "ttft.png")
    assert (tmp_path / "deep" / "ttft.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.engine
def test_an_interrupted_run_gives_what_it_has(
    tiny_session: Any, tiny_path: Path, interrupt_at: Callable[[str], Callable[[str], None]]
) -> None:
    config = TtftConfig(
        model=str(tiny_path), lengths="200,300", chunks="3", modes="prefix", repeats=1
    )
    report = ttft.run(config, interrupt_at("200 tokens"), session=tiny_session)
    assert report["interrupted"] is True
    assert [point["prompt_tokens"] for point in report["points"]] == [200]
    with pytest.raises(KeyboardInterrupt):
        ttft.run(config, interrupt_at("starting"), session=tiny_session)


def test_a_prompt_longer_than_the_context_is_refused_before_the_engine_starts(
    tiny_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ttft.main(["--model", str(tiny_path), "--lengths", "9000"]) == 1
    assert "context is 8192" in capsys.readouterr().err
