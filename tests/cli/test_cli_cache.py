"""``rag-pipeline cache``: what is refused before anything is asked or changed, and what a folder says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from chunk_cache import ChunkKey, ChunkKV, KVContext, StoreFolder
from rag_pipeline.cli import main
from rag_pipeline.cli.cache_server import parse_ttl
from rag_pipeline.errors import RagPipelineError

CONTEXT = KVContext(
    model_fingerprint="m", dtype="float32", kv_dtype="float32", rope="{}", prefix_digest="-"
)


@pytest.fixture
def folder(tmp_path: Path) -> StoreFolder:
    made = StoreFolder(tmp_path / "kv", create=True)
    record = ChunkKV(
        key=ChunkKey.of(CONTEXT, range(70)),
        token_ids=torch.arange(70, dtype=torch.int32).numpy(),
        base_position=3,
        k=torch.zeros(2, 70, 2, 16),
        v=torch.zeros(2, 70, 2, 16),
    )
    made.put(record, context=CONTEXT)
    return made


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("90s", 90), ("1.5m", 90), ("2h", 7200), ("7D", 604_800), (" 1w ", 604_800)],
)
def test_times(text: str, seconds: float) -> None:
    assert parse_ttl(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "0", "-1", "2 hours", "h", "1e3", "nan", "inf", "99w99", "999999w"]
)
def test_what_is_no_time_is_one_line(text: str) -> None:
    with pytest.raises(RagPipelineError, match="--ttl is") as refusal:
        parse_ttl(text)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("words", "code", "named"),
    [
        (["pin", "ab", "--ttl", "soon"], 1, "--ttl is 'soon'"),
        (["prefetch", "ab"], 2, "--url"),
        (["ls", "--tier", "disk"], 2, "--tier needs --url"),
        (["stats", "--admin-api-key-file", "x"], 2, "--admin-api-key-file needs --url"),
        (["stats", "--url", "http://127.0.0.1:1"], 1, "no server answers"),
        (["stats", "--url", "http://[", "--json"], 1, "no server answers"),
        (["ls", "--url", "x", "--store", "y"], 2, "two places"),
        (["pin", "--ttl", "1h"], 2, "KEY"),
    ],
)
def test_a_mistake_is_one_line(
    words: list[str],
    code: int,
    named: str,
    folder: StoreFolder,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("RAG_PIPELINE_HOME", str(tmp_path))
    assert main(["cache", *words]) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert named in printed.err
    assert folder.pins() == {}


def test_a_pin_with_an_end_is_shown_with_what_is_left(
    folder: StoreFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    (key,) = folder.keys()
    where = ["--store", str(folder.path)]
    assert main(["cache", "pin", key.digest[:8], "--ttl", "2h", *where, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["pinned"], report["ttl_s"], report["pinned_chunks"]) == ([key.digest], 7200, 1)
    assert main(["cache", "ls", *where, "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)["entries"]
    assert entry["pinned"]
    assert 7100 < entry["pin_ttl_s"] <= 7200
    assert main(["cache", "ls", *where]) == 0
    assert "pinned for 7" in capsys.readouterr().out.splitlines()[0]
    assert main(["cache", "unpin", key.digest, *where, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["unpinned"] == [key.digest]


def test_what_each_replica_did_is_a_line_of_its_own(capsys):
    from rag_pipeline.cli.cache import _show

    replicas = [{"pinned": ["ab" * 32], "tiers": [{"name": "disk"}]}, {"pinned": []}]
    _show({"action": "pin", "replicas": replicas}, json_output=False)
    lines = capsys.readouterr().out.splitlines()
    assert [" ".join(line.split()) for line in lines] == [
        "action pin",
        f"replica 0 pinned {'ab' * 8}; tiers name disk",
        "replica 1 pinned none",
    ]
