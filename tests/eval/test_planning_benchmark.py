"""The planning benchmark measures the whole work, and says no to nonsense in one line."""

from __future__ import annotations

import json

import pytest

from rag_eval.benchmarks import planning

SMALL = ["--stored", "1,40", "--chunk-tokens", "80", "--repeats", "2", "--policies", "epic:0.5"]


def test_every_kind_is_timed_for_every_store(capsys):
    assert planning.main([*SMALL, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["prompt_tokens"] == 36 + 6 * 80 + 24
    assert [report["stores"][size]["matched_chunks"] for size in ("1", "40")] == [1, 6]
    for row in report["stores"].values():
        assert {"match_spans", "match_scan", "plan_epic:0.5", "plan_query", "total_spans"} <= set(
            row
        )
        assert all(part["n"] == 2 for part in row.values() if isinstance(part, dict))


def test_a_chunk_that_is_not_found_stops_the_run():
    config = planning.PlanningConfig(stored="3", chunk_tokens=80, repeats=1)
    bench = planning._Bench(config, 3)
    known = bench._runtime.store.keys()[0]
    assert bench._runtime.store.evict(known)
    with pytest.raises(AssertionError, match="matched 2 of 3"):
        bench.measure()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--stored", "0"], "stored"),
        (["--policies", "best"], "best"),
        (["--repeats", "0"], "repeats"),
    ],
)
def test_nonsense_is_one_line(words, named, refusal):
    assert named in refusal(planning.main, words)
