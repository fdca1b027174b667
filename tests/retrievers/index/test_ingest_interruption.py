"""A real ingest in a real process, interrupted by signals, then run again."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from retrievers import Embedder, Index, Manifest, RetrievalError, ingest

CHILD = Path(__file__).with_name("ingest_child.py")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

pytestmark = pytest.mark.slow


def start(index: Path, model: Path, *extra: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "ignore", str(CHILD), str(index), str(model), *extra]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    )


def result(process: subprocess.Popen[str]) -> dict[str, object]:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    final: dict[str, object] = json.loads(out.splitlines()[-1])
    assert final["stage"] == "done"
    return final


@pytest.fixture(scope="module")
def child() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ingest_child", CHILD)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def strike(index: Path, model: Path, number: signal.Signals, minimum: int) -> str:
    """Send a signal once this many texts are embedded; returns what went to stderr."""
    process = start(index, model, str(minimum))
    assert process.stdout is not None
    for line in process.stdout:
        if json.loads(line)["embedded"] >= minimum:
            break
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    return err


def test_signals_while_embedding(
    tmp_path: Path,
    embedder_folder: Path,
    real_embedder: Embedder,
    make_splitter: type,
    child: ModuleType,
) -> None:
    index = tmp_path / "index"
    documents = child.documents()
    # An older state, which must stay usable throughout.
    ingest(documents[:5], index, splitter=make_splitter(), embedder=real_embedder)
    before = Manifest.read(index)
    journal = index / ".work" / "journal"
    counts = [0]
    for number in (signal.SIGINT, signal.SIGKILL):
        err = strike(index, embedder_folder, number, 2 * child.SHARD_CHUNKS)
        if number is signal.SIGINT:
            assert "KeyboardInterrupt" in err
        assert Manifest.read(index) == before
        with Index.open(index, embedder=real_embedder) as opened:
            hits = opened.retriever("dense").search("t\n" + documents[2].text, k=1)
            assert hits[0].chunk.document_id == "d2"
        counts.append(len(list(journal.rglob("*.npy"))))
        # The second run went on where the first one stopped.
        assert counts[-1] >= counts[-2] + 2

    # A shard cut off by a power failure is not believed.
    shards = sorted(journal.rglob("*.npy"))
    shards[-1].write_bytes(shards[-1].read_bytes()[:-100])
    final = result(start(index, embedder_folder))
    resumed = child.SHARD_CHUNKS * (counts[-1] - 1)
    assert final["chunks_resumed"] == resumed
    assert final["chunks_embedded"] == child.NUM_DOCUMENTS - 5 - resumed
    assert final["documents_unchanged"] == 5
    assert not (index / ".work").exists()
    with Index.open(index, embedder=real_embedder) as opened:
        opened.verify()
        assert len(opened) == child.NUM_DOCUMENTS
        for document in documents[::16]:
            hits = opened.retriever("dense").search("t\n" + document.text, k=1)
            assert hits[0].chunk.text == document.text


def test_killed_during_the_commit(tmp_path: Path, child: ModuleType) -> None:
    index = tmp_path / "index"
    process = start(index, Path("hash"), "write")
    process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL
    assert [path.name for path in index.glob("gen-*")] == ["gen-000001"]
    with pytest.raises(RetrievalError, match="holds no index"):
        Index.open(index)
    final = result(start(index, Path("hash")))
    assert final["chunks_embedded"] == 0
    assert final["chunks_resumed"] == child.NUM_DOCUMENTS
    with Index.open(index) as opened:
        opened.verify()
        assert len(opened) == child.NUM_DOCUMENTS
