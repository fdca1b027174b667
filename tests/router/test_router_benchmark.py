"""The router benchmark without servers: its workload, how it reads metrics, what it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from answering import answering

from rag_eval.benchmarks.router import RouterBenchConfig, main, make_requests
from rag_eval.benchmarks.router_process import RouterProgram, counters
from rag_eval.errors import EvalError

METRICS = """\
# HELP sglang:num_requests_total Number of requests processed.
sglang:num_requests_total{is_streaming="false",model_name="m"} 4.0
sglang:num_requests_total{is_streaming="true",model_name="m"} 3.0
rag_fusion:tokens_total{kind="reused",tp_rank="0"} 1.5e+02
rag_fusion:tokens_total{kind="fresh",tp_rank="0"} 7.0
rag_fusion:spans_total{kind="stored",tp_rank="0"} 5.0
rag_fusion:background_total{kind="queued",tp_rank="0"} 9.0
rag_fusion:background_total{kind="started",tp_rank="0"} 6.0
rag_fusion:background_total{kind="obsolete",tp_rank="0"} 1.0
rag_fusion:match_seconds_sum{tp_rank="0"} 0.25
"""


@pytest.fixture
def metrics_url() -> Iterator[str]:
    with answering({"/metrics": (200, METRICS)}, with_key=False) as url:
        yield url


def test_counters_add_up_labels_and_find_open_builds(metrics_url: str) -> None:
    found = counters(metrics_url)
    assert found["requests"] == 7
    assert found["reused"] == 150
    assert found["fresh"] == 7
    assert found["stored"] == 5
    assert found["hit"] == 0
    assert found["builds_open"] == 2


def test_requests_of_a_topic_share_chunks_and_other_runs_share_none() -> None:
    config = RouterBenchConfig(topics=3, pool=5, chunks=4, chunk_tokens=20, requests=4)
    made = make_requests(config, "one")
    assert made == make_requests(config, "one")
    assert len(made) == 12
    chunks: dict[str, set[tuple[int, ...]]] = {}
    for request in made:
        own = {request.input_ids[start:end] for start, end in request.spans}
        assert len(own) == config.chunks
        assert all(len(chunk) == config.chunk_tokens for chunk in own)
        chunks.setdefault(request.topic, set()).update(own)
    assert {len(pool) for pool in chunks.values()} <= {4, 5}
    pools = list(chunks.values())
    assert not pools[0] & pools[1]
    assert not pools[0] & pools[2]
    assert len({request.input_ids for request in made}) == len(made)
    others = {
        request.input_ids[start:end]
        for request in make_requests(config, "two")
        for start, end in request.spans
    }
    assert not others & set.union(*pools)


@pytest.mark.parametrize("wrong", [{"topics": 0}, {"chunks": 7, "pool": 6}, {"requests": -1}])
def test_a_shape_that_makes_no_sense_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(EvalError, match=next(iter(wrong))):
        RouterBenchConfig(**wrong)


def test_a_program_that_is_no_router_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "smg"
    other.write_text("#!/bin/sh\necho usage: something else\n")
    other.chmod(0o755)
    with pytest.raises(EvalError, match="no router"):
        RouterProgram.find(str(other))
    with pytest.raises(SystemExit) as stopped:
        main(["--router", "no-such-router"])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert "no-such-router" in error
    assert error.count("\n") == 1


def test_a_router_is_asked_for_its_policies(tmp_path: Path) -> None:
    program = tmp_path / "smg"
    program.write_text(
        "#!/bin/sh\necho 'usage: smg [--policy {random,manual,consistent_hashing}]'\n"
    )
    program.chmod(0o755)
    (tmp_path / "python").write_text("#!/bin/sh\necho 9.8.7\n")
    (tmp_path / "python").chmod(0o755)
    found = RouterProgram.find(str(program))
    assert found.name == "smg"
    assert found.version == "9.8.7"
    assert found.policies == ("random", "manual", "consistent_hashing")
