"""What writes records to a tier behind the requests: it holds nobody up, drops what does not fit, and waits for a pause."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from chunk_cache import BackgroundWriter, ChunkKey, ChunkKV, KVContext, StoreFolder
from chunk_cache.tiers import background_writer

Make = Callable[..., ChunkKV]


class HungFolder(StoreFolder):
    """A folder whose disk does not answer until told to; everything else is real."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, create=True)
        self.answers = threading.Event()
        self.asked = threading.Event()

    def put(self, record: ChunkKV, **options: Any) -> bool:
        self.asked.set()
        self.answers.wait(60)
        return super().put(record, **options)


@pytest.fixture
def hung(tmp_path: Path) -> Iterator[HungFolder]:
    folder = HungFolder(tmp_path / "kv")
    yield folder
    folder.answers.set()


def writer_of(folder: StoreFolder, counts: list[str], **options: object) -> BackgroundWriter:
    return BackgroundWriter(folder, count=counts.append, failed=print, **options)  # type: ignore[arg-type]


def test_a_hung_disk_holds_nobody_up_and_costs_what_does_not_fit_the_queue(
    hung: HungFolder, make_record: Make, context: KVContext
) -> None:
    records = [make_record(range(n, n + 20)) for n in range(0, 1000, 100)]
    counts: list[str] = []
    writer = writer_of(hung, counts, queue_bytes=3 * records[0].num_bytes)
    taken = [writer.put(record, context, "") for record in records]
    assert taken == [True] * 3 + [False] * 7
    assert counts == ["dropped"] * 7
    assert not writer.close(timeout_s=0.05)
    assert not writer.put(records[0], context, "")
    hung.answers.set()
    assert writer.close(timeout_s=60)
    assert set(hung.keys()) == {record.key for record in records[:3]}
    assert counts.count("written") == 3


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priority of their own")
def test_whoever_writes_lets_others_go_first(
    tmp_path: Path, make_record: Make, context: KVContext
) -> None:
    seen: list[int] = []

    class Watched(StoreFolder):
        def put(self, record: ChunkKV, **options: object) -> bool:
            seen.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
            return True

    mine = os.getpriority(os.PRIO_PROCESS, os.getpid())
    writer = writer_of(Watched(tmp_path / "kv", create=True), [])
    writer.put(make_record(range(20)), context, "")
    assert writer.close(timeout_s=60)
    assert seen == [min(mine + 10, 19)]
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == mine


def test_what_is_erased_while_it_waits_or_is_written_does_not_reach_the_disk(
    hung: HungFolder, make_record: Make, context: KVContext
) -> None:
    records = [make_record(range(n, n + 20)) for n in range(0, 300, 100)]
    erased: set[ChunkKey] = set()
    counts: list[str] = []
    writer = writer_of(hung, counts, is_erased=lambda record, tenant: record.key in erased)
    for record in records:
        writer.put(record, context, "")
    assert hung.asked.wait(60)
    erased |= {records[0].key, records[1].key}
    hung.answers.set()
    assert writer.drain(60)
    assert set(hung.keys()) == {records[2].key}
    assert sorted(counts) == ["erased", "erased", "written"]
    hung.asked.clear()
    hung.answers.clear()
    for record in records[:2]:
        erased.discard(record.key)
        writer.put(record, context, "")
    assert hung.asked.wait(60)
    writer.clear()
    hung.answers.set()
    assert writer.drain(60)
    assert set(hung.keys()) == {records[2].key, records[0].key}


class Pause:
    """Said by the test."""

    def __init__(self) -> None:
        self.asked = threading.Semaphore(0)
        self.is_on = False

    def __call__(self) -> bool:
        self.asked.release()
        return self.is_on


def test_a_record_waits_for_a_pause(tmp_path: Path, make_record: Make, context: KVContext) -> None:
    folder, pause, counts = StoreFolder(tmp_path / "kv", create=True), Pause(), list[str]()
    writer = writer_of(folder, counts, is_pause=pause)
    record = make_record(range(100, 120))
    assert writer.put(record, context, "")
    assert pause.asked.acquire(timeout=60)
    assert writer.pending == 1
    assert not folder.contains(record.key)
    pause.is_on = True
    deadline = time.monotonic() + 60
    while writer.pending:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert folder.contains(record.key)
    assert writer.close(60)
    assert counts == ["written"]


@pytest.mark.parametrize("how", ["late", "full", "drained", "closed"])
def test_a_record_waits_for_a_pause_no_longer_than_it_may(
    how: str, tmp_path: Path, make_record: Make, context: KVContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = make_record(range(100, 120))
    monkeypatch.setattr(background_writer, "HOLD_S", 0.01 if how == "late" else 1e9)
    folder, counts, done = StoreFolder(tmp_path / "kv", create=True), list[str](), threading.Event()
    writer = writer_of(
        folder,
        counts,
        is_pause=lambda: False,
        wrote=lambda num_bytes, seconds: done.set(),
        queue_bytes=record.num_bytes * (1 if how == "full" else 10),
    )
    assert writer.put(record, context, "")
    if how == "drained":
        assert writer.drain(60)
    elif how == "closed":
        assert writer.close(60)
    assert done.wait(60)
    assert folder.contains(record.key)
    assert writer.close(60)
    assert counts == ["written"]
