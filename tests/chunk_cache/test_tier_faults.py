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
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from valkey_server import Server

from chunk_cache import (
    Build,
    Candidate,
    ChunkKV,
    Fetcher,
    KVContext,
    LoadError,
    MemoryStore,
    RecordForm,
    StoreFolder,
    TierChain,
)
from chunk_cache.tiers.prefetch import FetchGate
from chunk_cache.tiers.remote.connect import connect_remote
from rag_eval.io_faults import CHANGES, DiskCalls, Fault

Make = Callable[..., ChunkKV]
LAYERS = 4
BUDGET = 1 << 28


class Chain:
    """Tiers under a memory store; a fault strikes when the first layer of a record has come."""

    def __init__(self, tiers: dict[str, Any], record: ChunkKV, context: KVContext) -> None:
        self.record, self.context = record, context
        self.counts: Counter[str] = Counter()
        self.refused: list[Exception] = []
        self.fault: Callable[[], object] | None = None
        self.store = MemoryStore(BUDGET)
        self.tiers = TierChain(
            tiers,
            count=lambda tier, kind: self.counts.update([f"{tier}.{kind}"]),
            failed=lambda tier, error: self.refused.append(error),
        )
        self.fetcher = Fetcher(
            self.tiers,
            self.store,
            RecordForm.of(record),
            count=lambda tier, kind: self.counts.update([f"{tier}.{kind}"]),
            took=self._took,
            threads=1,
            patience_s=30.0,
        )

    def _took(self, tier: str, num_bytes: int, seconds: float) -> None:
        fault, self.fault = self.fault, None
        if fault is not None:
            fault()

    def fetch(self) -> bool:
        """Ask for the record as a request does, and use it as a forward does; whether every layer came."""
        record = self.record
        candidate = Candidate(record.key, record.token_ids, self.context, "")
        fetches = self.fetcher.begin([[candidate]])
        assert self.fetcher.wait(lambda: all(one.has_header for one in fetches), 60)
        lease = self.store.acquire(record.key, record.token_ids)
        if lease is None:
            assert self.fetcher.drain(60)
            return False
        with lease:
            try:
                for layer in range(record.num_layers):
                    found = lease.record.layer(layer)
                    assert torch.equal(found.k, record.k[layer])
                    assert torch.equal(found.v, record.v[layer])
            except LoadError:
                return False
            finally:
                assert self.fetcher.drain(60)
        return True

    def may_be_computed(self) -> bool:
        """Whether the next request may compute the chunk at once; leaves it absent."""
        build = self.store.begin_build(self.record.key, self.record.token_ids, owner="test")
        if isinstance(build, Build):
            build.abort("test", failed=False)
            return True
        return False

    def close(self) -> None:
        assert self.fetcher.close(60)
        assert self.tiers.close(60)
        self.store.check_integrity(expect_idle=True)


@pytest.fixture
def record(make_record: Make) -> ChunkKV:
    return make_record(range(60), layers=LAYERS, dim=32)


@pytest.fixture
def folder(tmp_path: Path) -> StoreFolder:
    return StoreFolder.connect(str(tmp_path / "kv"), byte_budget=BUDGET, model="")


@pytest.fixture
def chain(folder: StoreFolder, record: ChunkKV, context: KVContext) -> Iterator[Chain]:
    folder.put(record, context=context)
    made = Chain({"disk": folder}, record, context)
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
    damage: str, chain: Chain, folder: StoreFolder
) -> None:
    path = file_of(folder)
    chain.fault = {
        "cut": lambda: cut(path),
        "emptied": lambda: os.truncate(path, 0),
        "bit flipped": lambda: flip(path, path.stat().st_size - 9),
    }[damage]
    assert not chain.fetch()
    assert chain.counts == {"disk.hit": 1, "disk.opened": 1, "disk.damaged": 1}
    assert folder.corrupt_files == 1
    assert not path.exists()
    assert chain.may_be_computed()
    assert not chain.fetch()
    assert chain.counts["disk.miss"] == 1
    assert folder.put(chain.record, context=chain.context)
    assert chain.fetch()


@pytest.mark.parametrize("gone", ["file", "folder"])
def test_a_file_that_is_removed_while_it_is_read_is_read_to_its_end(
    gone: str, chain: Chain, folder: StoreFolder
) -> None:
    chain.fault = file_of(folder).unlink if gone == "file" else lambda: shutil.rmtree(folder.path)
    assert chain.fetch()
    chain.store.clear()
    assert not chain.fetch()
    assert chain.counts == {
        "disk.hit": 1,
        "disk.opened": 1,
        "disk.fetched": 1,
        "disk.miss": 1,
    }
    assert chain.may_be_computed()


def refuse(*_: Any) -> int:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_a_disk_that_fails_in_the_middle_is_a_miss_and_keeps_the_file(
    chain: Chain, folder: StoreFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        chain.fault = lambda: patch.setattr(os, "preadv", refuse)
        assert not chain.fetch()
        assert chain.counts == {"disk.hit": 1, "disk.opened": 1, "disk.fetch_failed": 1}
        assert chain.may_be_computed()
    assert folder.corrupt_files == 0
    assert chain.fetch()


def test_a_file_that_a_network_folder_lost_while_it_is_read_is_gone_and_not_damaged(
    chain: Chain, folder: StoreFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stale(*_: Any) -> int:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    with monkeypatch.context() as patch:
        chain.fault = lambda: patch.setattr(os, "preadv", stale)
        assert not chain.fetch()
        assert chain.counts == {"disk.hit": 1, "disk.opened": 1, "disk.gone": 1}
        assert not chain.fetch(), "what is gone when it is opened is a plain miss"
        assert chain.counts["disk.miss"] == 1
    assert folder.corrupt_files == folder.failed_reads == 0
    assert chain.may_be_computed()
    assert chain.fetch()


def test_a_folder_that_may_not_be_read_any_more_is_a_miss_and_comes_back(
    chain: Chain, folder: StoreFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def forbid(path: Any, *rest: Any, **more: Any) -> int:
        # Rights themselves do not bind the superuser, who may run this.
        if str(path).startswith(str(folder.path)):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path, *rest, **more)

    with monkeypatch.context() as patch:
        chain.fault = lambda: patch.setattr(os, "open", forbid)
        assert chain.fetch(), "what is open stays readable"
        chain.store.clear()
        assert not chain.fetch()
        assert chain.counts["disk.miss"] == folder.failed_reads == 1
        assert chain.may_be_computed()
    assert chain.fetch()
    assert chain.counts["disk.fetched"] == 2


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOSPC], ids=errno.errorcode.get)
def test_a_folder_that_may_not_be_written_costs_the_copy_and_is_read(
    code: int, chain: Chain, folder: StoreFolder, make_record: Make
) -> None:
    other = make_record(range(100, 160), layers=LAYERS, dim=32)
    with DiskCalls(folder.path, fault=Fault(kinds=CHANGES, nth=0, errno=code, lasting=True)):
        assert chain.tiers.put(other, context=chain.context)
        assert chain.tiers.drain(60)
        assert chain.counts["disk.write_failed"] == 1
        assert [getattr(error, "errno", None) for error in chain.refused] == [code]
        assert chain.fetch()
    assert not folder.contains(other.key)
    assert chain.tiers.put(other, context=chain.context)
    assert chain.tiers.drain(60)
    assert chain.counts["disk.written"] == 1
    assert folder.contains(other.key)


@pytest.mark.parametrize("jump_s", [-10 * 365 * 24 * 3600, 10 * 365 * 24 * 3600])
def test_a_clock_that_jumps_while_a_record_is_read_changes_nothing(
    jump_s: int, chain: Chain, folder: StoreFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, real_ns = time.time, time.time_ns

    def jump() -> None:
        monkeypatch.setattr(time, "time", lambda: real() + jump_s)
        monkeypatch.setattr(time, "time_ns", lambda: real_ns() + jump_s * 10**9)

    chain.fault = jump
    assert chain.fetch()
    assert chain.tiers.put(chain.record, context=chain.context)
    assert chain.tiers.drain(60)
    chain.tiers.used([chain.record.key])
    chain.store.clear()
    assert chain.fetch()
    assert chain.counts["disk.fetched"] == 2
    assert folder.keys_by_use() == [chain.record.key]
    again = StoreFolder.connect(str(folder.path), byte_budget=BUDGET, model="")
    assert list(again.keys()) == [chain.record.key]


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
    chain = Chain({"disk": folder, "remote": remote}, record, context)

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
        assert not chain.fetch()
        event = "gone" if how == "emptied" else "fetch_failed"
        assert chain.counts["remote.opened"] == chain.counts[f"remote.{event}"] == 1
        assert chain.counts["remote.damaged"] == remote.counts["damaged"] == 0
        assert remote.tier.damaged_records == 0  # type: ignore[attr-defined]
        assert chain.may_be_computed()
        for _ in range(3):  # nobody waits for a server that is known to be down
            assert not chain.fetch()
        assert chain.counts["remote.miss"] == 3
        assert chain.counts["disk.miss"] == 4
        chain.record = local
        assert chain.fetch()
        assert chain.counts["disk.fetched"] == 1
        if how != "emptied":
            assert remote.stats()["state"] != "closed"
    finally:
        if server.process is not None:
            server.resume()
        chain.close()
