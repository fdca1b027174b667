"""The benchmark of overlap: what is expected of a request, its trace, the slow line, and a small run in real engines."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from chunk_cache import TIERS
from chunk_cache.tiers.timeline import Interval
from rag_eval import EvalError
from rag_eval.benchmarks import overlap
from rag_eval.benchmarks.overlap_config import OverlapConfig
from rag_eval.benchmarks.overlap_trace import COLUMNS, RequestTrace, plot_traces
from rag_eval.command import no_progress
from rag_eval.throttled_tier import NAME, Line, ThrottledFolder, throttled_tier

LAYERS = 6


def trace_of(load_s: float, compute_s: float, ahead: int) -> RequestTrace:
    """What an engine records that follows the timeline to the letter; the last layer ends the request."""
    sent = end = 100.0
    rows: list[Interval] = []
    for n in range(LAYERS):
        began = sent + max(0, n - ahead) * load_s
        there = began + load_s * (n >= ahead)
        if load_s:
            rows.append(Interval("load", n, began, there))
        rows.append(Interval("wait", n, end, max(end, there)))
        end = max(end, there)
        rows.append(Interval("compute", n, end, end + compute_s))
        end += compute_s
    return RequestTrace(sent, rows)


@pytest.mark.parametrize("ahead", [0, 2, LAYERS, LAYERS + 3])
@pytest.mark.parametrize("load_s", [0.5, 2.0])
def test_an_engine_that_follows_the_timeline_has_ratio_one(load_s: float, ahead: int) -> None:
    compute_s, other_s = 1.0, 0.25
    tier = trace_of(load_s, compute_s, ahead)
    tier_s = tier.intervals[-1].ended - tier.sent + other_s
    memory_s = other_s + LAYERS * compute_s
    found = overlap.pair_of(tier, tier_s, trace_of(0.0, compute_s, 0), memory_s, ahead)
    if ahead < LAYERS:
        assert found.load_s == pytest.approx(load_s)
    assert found.compute_s == pytest.approx(compute_s)
    assert found.ttft_s == pytest.approx(found.expected_s)


def test_a_trace_has_the_intervals_of_its_request_alone() -> None:
    state = {
        "trace": [
            ["load", 0, 9.0, 9.5, "old"],
            ["load", 0, 10.0, 11.0, "a"],
            ["load", 0, 11.0, 12.0, "b"],
            ["wait", 0, 10.5, 12.0, ""],
            ["compute", 0, 12.0, 14.0, ""],
            ["compute", 0, 30.0, 31.0, ""],
        ]
    }
    trace = RequestTrace.of(state, 9.9, 20.0)
    assert trace.layer_load_s() == pytest.approx(2.0)
    assert trace.rows() == [[100.0, 2100.0, 600.0, 2100.0, 4100.0]]
    assert len(trace.rows()[0]) == len(COLUMNS)
    assert "#" in trace.text()[0]


def test_layers_from_memory_have_no_loading(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is in the extra eval")
    rows = trace_of(0.0, 1.0, 0).rows()
    assert [row[:2] for row in rows] == [[None, None]] * LAYERS
    plot_traces({"memory": rows, "k = 2": trace_of(2.0, 1.0, 2).rows()}, tmp_path / "a" / "b.png")
    assert (tmp_path / "a" / "b.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b.png"]


def test_a_line_carries_one_transfer_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "perf_counter", lambda: 50.0)
    monkeypatch.setattr(time, "sleep", slept.append)
    line = Line()
    threads = [threading.Thread(target=line.transfer, args=(30.0, 10.0)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(slept) == [3.0, 6.0, 9.0]


def test_the_tier_is_known_by_name_only_meanwhile() -> None:
    with throttled_tier() as name:
        assert TIERS.get(name) is ThrottledFolder
    assert NAME not in TIERS.names()


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"preloaded": "0,x"}, "whole numbers"),
        ({"preloaded": "-1"}, "whole numbers"),
        ({"load_share": 0.0}, "more than 0"),
        ({"load_share": float("nan")}, "more than 0"),
        ({"repeats": 0}, "repeats"),
    ],
)
def test_what_cannot_be_measured_is_refused(given: dict[str, Any], line: str) -> None:
    with pytest.raises(EvalError, match=line):
        OverlapConfig(**given)


@pytest.mark.engine
@pytest.mark.slow
def test_real_engines_are_compared_with_the_timeline(tiny_path: Path, tmp_path: Path) -> None:
    config = OverlapConfig(
        model=str(tiny_path),
        chunks=2,
        chunk_tokens=120,
        preloaded="0,2",
        repeats=2,
        plot=str(tmp_path / "trace.png"),
    )
    report = overlap.run(config, no_progress)
    json.dumps(report, allow_nan=False)
    assert list(report["preloaded"]) == ["0", "2"]
    for row in report["preloaded"].values():
        assert row["n"] == 2
        assert row["ratio"] > 0
        assert row["load_s"] > 0
        assert all(None not in layer for layer in row["trace"])
    assert "k = 0" in overlap.table(report)
    assert (tmp_path / "trace.png").exists()
