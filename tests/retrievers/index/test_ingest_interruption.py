"""A real ingest in a real process, interrupted by signals, then run again."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
from warm import WarmProcess, WarmStart

from retrievers import Embedder, Index, Manifest, RetrievalError, ingest

CHILD = Path(__file__).with_name("ingest_child.py")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

pytestmark = pytest.mark.slow


class Child(NamedTuple):
    """A running ingest, and the files of what it says."""

    process: WarmProcess
    out: Path
    err: Path

    def reports(self) -> list[dict[str, Any]]:
        """Its whole lines so far."""
        return [
            json.loads(line) for line in self.out.read_text().splitlines(True) if line[-1:] == "\n"
        ]

    def result(self) -> dict[str, Any]:
        assert self.process.wait(timeout=300) == 0, self.err.read_text()
        final = self.reports()[-1]
        assert final["stage"] == "done"
        return final


Start = Callable[..., Child]


@pytest.fixture
def start(warm_start: WarmStart, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Starts an ingest: ``start(index, model, *extra)``."""
    started: list[Child] = []

    def make(index: Path, model: Path, *extra: str) -> Child:
        folder = tmp_path_factory.mktemp("child")
        out, err = folder / "out", folder / "err"
        words = [sys.executable, CHILD, index, model, *extra]
        process = warm_start.popen(words, environment=ENVIRONMENT, stdout=out, stderr=err)
        started.append(Child(process, out, err))
        return started[-1]

    yield make
    for one in started:
        one.process.kill_group()


@pytest.fixture(scope="module")
def child() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ingest_child", CHILD)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def strike(start: Start, index: Path, model: Path, number: signal.Signals, minimum: int) -> str:
    """Send a signal once this many texts are embedded; returns what went to stderr."""
    one = start(index, model, str(minimum))
    deadline = time.monotonic() + 300
    while not any(report["embedded"] >= minimum for report in one.reports()):
        assert one.process.poll() is None, one.err.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    one.process.send_signal(number)
    assert one.process.wait(timeout=120) != 0
    return one.err.read_text()


def test_signals_while_embedding(
    tmp_path: Path,
    embedder_folder: Path,
    real_embedder: Embedder,
    make_splitter: type,
    child: ModuleType,
    start: Start,
) -> None:
    index = tmp_path / "index"
    documents = child.documents()
    # An older state, which must stay usable throughout.
    ingest(documents[:5], index, splitter=make_splitter(), embedder=real_embedder)
    before = Manifest.read(index)
    journal = index / ".work" / "journal"
    counts = [0]
    for number in (signal.SIGINT, signal.SIGKILL):
        err = strike(start, index, embedder_folder, number, 2 * child.SHARD_CHUNKS)
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
    final = start(index, embedder_folder).result()
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


def test_killed_during_the_commit(tmp_path: Path, child: ModuleType, start: Start) -> None:
    index = tmp_path / "index"
    assert start(index, Path("hash"), "write").process.wait(timeout=300) == -signal.SIGKILL
    assert [path.name for path in index.glob("gen-*")] == ["gen-000001"]
    with pytest.raises(RetrievalError, match="holds no index"):
        Index.open(index)
    final = start(index, Path("hash")).result()
    assert final["chunks_embedded"] == 0
    assert final["chunks_resumed"] == child.NUM_DOCUMENTS
    with Index.open(index) as opened:
        opened.verify()
        assert len(opened) == child.NUM_DOCUMENTS
