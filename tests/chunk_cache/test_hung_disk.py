"""A disk that never answers: one bounded wait, then the other tiers go on, and nothing stays on its way."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from shelf import Shelf
from tier_stack import TierStack

from chunk_cache import (
    ChunkKV,
    KVContext,
    LoadError,
    StoreFolder,
)
from chunk_cache.tiers import guard
from chunk_cache.tiers.breaker import CircuitBreaker
from chunk_cache.tiers.deadline import BoundedCalls
from chunk_cache.tiers.guard import GuardedTier
from chunk_cache.tiers.guarded_calls import TierDownError
from rag_pipeline.sglang_plugin.fusion.builds import persistence
from rag_pipeline.sglang_plugin.fusion.config import FusionConfig

Make = Callable[..., ChunkKV]
NUM_RECORDS = 4


class Stack(TierStack):
    """A guarded folder above a second tier."""

    def __init__(self, path: Path, records: list[ChunkKV], context: KVContext, clock: Any) -> None:
        self.records = records
        self.folder = StoreFolder(path, create=True)
        self.disk = GuardedTier(
            self.folder,
            name="folder",
            breaker=CircuitBreaker(clock=clock),
            wait_s=0.2,
            may_hang=True,
            is_shared=False,
        )
        self.below = Shelf()
        super().__init__({"disk": self.disk, "below": self.below}, records[0], context)

    def file_of(self, record: ChunkKV) -> Path:
        (path,) = self.folder.path.rglob(f"*{record.key.digest[:16]}*.safetensors")
        return path


@pytest.fixture
def stack(tmp_path: Path, make_record: Make, context: KVContext, clock: Any) -> Iterator[Stack]:
    records = [make_record(range(n, n + 40), layers=3) for n in range(NUM_RECORDS)]
    made = Stack(tmp_path / "kv", records, context, clock)
    yield made
    made.close()


def test_files_that_never_open_hold_up_neither_the_other_tiers_nor_an_idle_engine(
    stack: Stack,
) -> None:
    for record in stack.records:
        assert stack.folder.put(record, context=stack.context)
        path = stack.file_of(record)
        path.unlink()
        os.mkfifo(path)  # opening it for reading waits for a writer, for ever
        assert stack.below.put(record)
    try:
        stack.begin(stack.records)
        assert stack.fetcher.drain(60), "what is on its way keeps an idle engine awake"
        ready = [stack.store.can_lease(record.key) for record in stack.records]
        assert ready == [True] * NUM_RECORDS, "they are in the tier below"
        assert stack.disk.stats()["state"] == "open"
        assert 1 <= stack.disk.counts["timeouts"] <= 2, "one per fetching thread, at most"
    finally:
        for record in stack.records:  # let what hangs go
            os.close(os.open(stack.file_of(record), os.O_RDWR))


def test_a_file_that_hangs_between_two_layers_ends_the_load(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = stack.records[0]
    assert stack.folder.put(record, context=stack.context)
    hang, preadv, calls = threading.Event(), os.preadv, []

    def read(*args: Any) -> int:
        calls.append(args)
        if len(calls) > 2:  # the header, the first layer
            hang.wait(60)
        return preadv(*args)

    monkeypatch.setattr(os, "preadv", read)
    try:
        fetches = stack.begin([record])
        assert stack.fetcher.wait(lambda: fetches[0].has_header, 60)
        lease = stack.store.acquire(record.key, record.token_ids)
        assert lease is not None
        with lease:
            assert stack.fetcher.drain(60)
            assert lease.record.layer(0).k.equal(record.k[0])
            with pytest.raises(LoadError):
                lease.record.layer(1)
    finally:
        hang.set()
    assert stack.counts["disk.fetch_failed"] == 1
    assert stack.file_of(record).exists(), "what hangs is not damaged"
    with pytest.raises(TierDownError):
        stack.disk.remove(record.key)


def test_a_disk_that_answers_again_is_used_again(
    stack: Stack, monkeypatch: pytest.MonkeyPatch, clock: Any
) -> None:
    record = stack.records[0]
    assert stack.folder.put(record, context=stack.context)
    hang, preadv = threading.Event(), os.preadv
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", lambda *args: hang.wait(60) and preadv(*args))
        stack.begin([record])
        assert stack.fetcher.drain(60)
        hang.set()
    assert not stack.store.can_lease(record.key)
    clock.now += 1.0
    stack.begin([record])
    assert stack.fetcher.drain(60)
    assert stack.store.can_lease(record.key)
    assert stack.disk.stats()["state"] == "closed"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_disk_that_refuses_to_write_is_still_read(
    number: int, stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = stack.records[0]
    assert stack.folder.put(record, context=stack.context)

    def refuse(*args: Any, **kwargs: Any) -> bool:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(stack.folder, "put", refuse)
    with pytest.raises(OSError, match=os.strerror(number)):
        stack.disk.put(stack.records[1], context=stack.context)
    assert stack.disk.stats()["state"] == "closed"
    assert stack.disk.open(record.key, record.token_ids) is not None


def test_an_engine_starts_without_a_folder_that_never_opens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    StoreFolder(tmp_path / "kv", create=True)
    (manifest,) = (path for path in (tmp_path / "kv").iterdir() if path.suffix == ".json")
    manifest.unlink()
    os.mkfifo(manifest)
    monkeypatch.setattr(guard, "CONNECT_S", 0.1)
    config = FusionConfig(store_dir=str(tmp_path / "kv"))
    _, connect = persistence.open_tiers(config, "no-model")["disk"]
    try:
        with pytest.raises(TimeoutError, match="no answer"):
            connect()
    finally:
        os.close(os.open(manifest, os.O_RDWR))


def test_calls_share_threads_and_those_that_hang_are_bounded() -> None:
    calls = BoundedCalls(most=2)
    assert [calls.run(lambda n=n: n, 60) for n in range(5)] == [0, 1, 2, 3, 4]  # type: ignore[misc]
    with pytest.raises(ZeroDivisionError):
        calls.run(lambda: 1 // 0, 60)
    workers = {calls.run(threading.get_ident, 60) for _ in range(5)}
    assert len(workers) == 1, "a thread that came back is used again"
    hang = threading.Event()
    for _ in range(2):
        with pytest.raises(TimeoutError, match="no answer"):
            calls.run(lambda: hang.wait(60), 0.01)
    with pytest.raises(TimeoutError, match="hang already"):
        calls.run(lambda: None, 60)
    hang.set()


def test_a_system_without_threads_costs_no_call_of_later(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    calls = BoundedCalls(2)
    with monkeypatch.context() as later:
        later.setattr(threading.Thread, "start", refuse)
        for _ in range(3):
            with pytest.raises(TimeoutError, match="thread"):
                calls.run(lambda: 1, 60)
    assert calls.run(lambda: 1, 60) == 1


def test_a_guarded_folder_pins_lists_checks_and_trims(stack: Stack) -> None:
    kept, damaged = stack.records[:2]
    for record in (kept, damaged):
        assert stack.disk.put(record, context=stack.context)
    assert stack.disk.pin(kept.key)
    assert stack.disk.is_pinned(kept.key)
    assert stack.disk.pins().keys() == {kept.key}
    sizes = stack.disk.sizes_of([kept.key, stack.records[2].key])
    assert sizes == [stack.file_of(kept).stat().st_size, 0]
    os.truncate(stack.file_of(damaged), 100)
    assert stack.disk.verify() == [damaged.key]
    assert stack.disk.verify(remove=True) == [damaged.key]
    assert stack.disk.trim(0) == []
    assert stack.disk.unpin(kept.key)
    assert stack.disk.trim(0) == [kept.key]
