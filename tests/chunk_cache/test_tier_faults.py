"""Faults below memory, each between two layers of a record that is being fetched: a miss and a count, never an error.

A real folder and a real Valkey server stand behind the chain and the fetcher that an engine uses. What each tier alone
makes of its faults is tested beside it; the table of all is in ``docs/tiers.md``.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tier_stack import BUDGET, TierStack
from valkey_server import Server

from chunk_cache import (
    ChunkKV,
    KVContext,
    StoreFolder,
)
from chunk_cache.tiers.prefetch import FetchGate
from chunk_cache.tiers.remote.connect import connect_remote
from rag_eval.io_faults import CHANGES, DiskCalls, Fault

Make = Callable[..., ChunkKV]
LAYERS = 4


def one_by_one(tiers: dict[str, Any], record: ChunkKV, context: KVContext) -> TierStack:
    """One thread reads, so that a fault strikes between two layers of the record."""
    return TierStack(tiers, record, context, threads=1, patience_s=30.0)


@pytest.fixture
def record(make_record: Make) -> ChunkKV:
    return make_record(range(60), layers=LAYERS, dim=32)


@pytest.fixture
def folder(tmp_path: Path) -> StoreFolder:
    return StoreFolder.connect(str(tmp_path / "kv"), byte_budget=BUDGET, model="")


@pytest.fixture
def stack(folder: StoreFolder, record: ChunkKV, context: KVContext) -> Iterator[TierStack]:
    folder.put(record, context=context)
    made = one_by_one({"disk": folder}, record, context)
    yield made
    made.close()


def file_of(folder: StoreFolder) -> Path:
    (path,) = folder.path.rglob("*.safetensors")
    return path


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("damage", ["cut", "emptied", "bit flipped"])
def test_a_file_that_is_damaged_while_it_is_read_is_a_miss_and_goes(
    damage: str, stack: TierStack, folder: StoreFolder
) -> None:
    path = file_of(folder)
    stack.fault = {
        "cut": lambda: cut(path),
        "emptied": lambda: os.truncate(path, 0),
        "bit flipped": lambda: flip(path, path.stat().st_size - 9),
    }[damage]
    assert not stack.fetch()
    assert stack.counts == {"disk.hit": 1, "disk.opened": 1, "disk.damaged": 1}
    assert folder.corrupt_files == 1
    assert not path.exists()
    assert stack.may_be_computed()
    assert not stack.fetch()
    assert stack.counts["disk.miss"] == 1
    assert folder.put(stack.record, context=stack.context)
    assert stack.fetch()


@pytest.mark.parametrize("gone", ["file", "folder"])
def test_a_file_that_is_removed_while_it_is_read_is_read_to_its_end(
    gone: str, stack: TierStack, folder: StoreFolder
) -> None:
    stack.fault = file_of(folder).unlink if gone == "file" else lambda: shutil.rmtree(folder.path)
    assert stack.fetch()
    stack.store.clear()
    assert not stack.fetch()
    assert stack.counts == {
        "disk.hit": 1,
        "disk.opened": 1,
        "disk.fetched": 1,
        "disk.miss": 1,
    }
    assert stack.may_be_computed()


def refuse(*_: Any) -> int:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_a_disk_that_fails_in_the_middle_is_a_miss_and_keeps_the_file(
    stack: TierStack, folder: StoreFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stack.fault = lambda: patch.setattr(os, "preadv", refuse)
        assert not stack.fetch()
        assert stack.counts == {"disk.hit": 1, "disk.opened": 1, "disk.fetch_failed": 1}
        assert stack.may_be_computed()
    assert folder.corrupt_files == 0
    assert stack.fetch()


def test_a_file_that_a_network_folder_lost_while_it_is_read_is_gone_and_not_damaged(
    stack: TierStack, folder: StoreFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stale(*_: Any) -> int:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    with monkeypatch.context() as patch:
        stack.fault = lambda: patch.setattr(os, "preadv", stale)
        assert not stack.fetch()
        assert stack.counts == {"disk.hit": 1, "disk.opened": 1, "disk.gone": 1}
        assert not stack.fetch(), "what is gone when it is opened is a plain miss"
        assert stack.counts["disk.miss"] == 1
    assert folder.corrupt_files == folder.failed_reads == 0
    assert stack.may_be_computed()
    assert stack.fetch()


def test_a_folder_that_may_not_be_read_any_more_is_a_miss_and_comes_back(
    stack: TierStack, folder: StoreFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def forbid(path: Any, *rest: Any, **more: Any) -> int:
        # Rights themselves do not bind the superuser, who may run this.
        if str(path).startswith(str(folder.path)):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path, *rest, **more)

    with monkeypatch.context() as patch:
        stack.fault = lambda: patch.setattr(os, "open", forbid)
        assert stack.fetch(), "what is open stays readable"
        stack.store.clear()
        assert not stack.fetch()
        assert stack.counts["disk.miss"] == folder.failed_reads == 1
        assert stack.may_be_computed()
    assert stack.fetch()
    assert stack.counts["disk.fetched"] == 2


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOSPC], ids=errno.errorcode.get)
def test_a_folder_that_may_not_be_written_costs_the_copy_and_is_read(
    code: int, stack: TierStack, folder: StoreFolder, make_record: Make
) -> None:
    other = make_record(range(100, 160), layers=LAYERS, dim=32)
    with DiskCalls(folder.path, fault=Fault(kinds=CHANGES, nth=0, errno=code, lasting=True)):
        assert stack.chain.put(other, context=stack.context)
        assert stack.chain.drain(60)
        assert stack.counts["disk.write_failed"] == 1
        assert [getattr(error, "errno", None) for error in stack.refused] == [code]
        assert stack.fetch()
    assert not folder.contains(other.key)
    assert stack.chain.put(other, context=stack.context)
    assert stack.chain.drain(60)
    assert stack.counts["disk.written"] == 1
    assert folder.contains(other.key)


@pytest.mark.parametrize("jump_s", [-10 * 365 * 24 * 3600, 10 * 365 * 24 * 3600])
def test_a_clock_that_jumps_while_a_record_is_read_changes_nothing(
    jump_s: int, stack: TierStack, folder: StoreFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, real_ns = time.time, time.time_ns

    def jump() -> None:
        monkeypatch.setattr(time, "time", lambda: real() + jump_s)
        monkeypatch.setattr(time, "time_ns", lambda: real_ns() + jump_s * 10**9)

    stack.fault = jump
    assert stack.fetch()
    assert stack.chain.put(stack.record, context=stack.context)
    assert stack.chain.drain(60)
    stack.chain.used([stack.record.key])
    stack.store.clear()
    assert stack.fetch()
    assert stack.counts["disk.fetched"] == 2
    assert folder.keys_by_use() == [stack.record.key]
    again = StoreFolder.connect(str(folder.path), byte_budget=BUDGET, model="")
    assert list(again.keys()) == [stack.record.key]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path)
    yield made
    made.kill()


@pytest.mark.parametrize("how", ["killed", "paused", "emptied"])
def test_a_remote_that_goes_in_mid_request_is_a_miss_and_the_disk_goes_on(
    how: str,
    server: Server,
    folder: StoreFolder,
    make_record: Make,
    context: KVContext,
) -> None:
    import valkey

    record = make_record(range(300), layers=8, heads=4, dim=64)
    local = make_record(range(500, 560), layers=8, heads=4, dim=64)
    remote = connect_remote(server.url + "?timeout=1", byte_budget=BUDGET, model="m")
    remote.put(record, context=context)
    folder.put(local, context=context)
    stack = one_by_one({"disk": folder, "remote": remote}, record, context)

    def strike() -> None:
        if how == "killed":
            server.kill()
        elif how == "paused":
            server.pause()
        else:
            valkey.Valkey(port=server.port).flushall()

    class StrikingGate(FetchGate):
        """What the server is asked through; the fault comes before it is asked for more than the first layer."""

        asked = 0

        @contextlib.contextmanager
        def call(self) -> Iterator[None]:
            with super().call():
                self.asked += 1
                if self.asked == 2:
                    strike()
                yield

    remote.tier._gate = StrikingGate(1)  # type: ignore[attr-defined]
    try:
        assert not stack.fetch()
        event = "gone" if how == "emptied" else "fetch_failed"
        assert stack.counts["remote.opened"] == stack.counts[f"remote.{event}"] == 1
        assert stack.counts["remote.damaged"] == remote.counts["damaged"] == 0
        assert remote.tier.damaged_records == 0  # type: ignore[attr-defined]
        assert stack.may_be_computed()
        for _ in range(3):  # nobody waits for a server that is known to be down
            assert not stack.fetch()
        assert stack.counts["remote.miss"] == 3
        assert stack.counts["disk.miss"] == 4
        stack.record = local
        assert stack.fetch()
        assert stack.counts["disk.fetched"] == 1
        if how != "emptied":
            assert remote.stats()["state"] != "closed"
    finally:
        if server.process is not None:
            server.resume()
        stack.close()
