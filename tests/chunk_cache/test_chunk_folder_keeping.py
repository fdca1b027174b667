"""What a store's folder keeps: for whom, how much, what crashes left, and what is read back first."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import errno
import fcntl
import os
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from chunk_cache import ChunkKey, ChunkKV, KVContext, MemoryStore, StoreFolder, load_store
from chunk_cache.tiers.disk import allocate
from chunk_cache.tiers.disk.layout import chunk_path, usage_path
from chunk_cache.tiers.disk.private_files import Draft, write_private
from chunk_cache.tiers.disk.usage import locked_usage
from rag_eval.io_faults import CHANGES, DiskCalls, Fault

Make = Callable[..., ChunkKV]


@pytest.fixture
def open_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def modes(folder: Path) -> set[int]:
    return {stat.S_IMODE(path.stat().st_mode) for path in (folder, *folder.rglob("*"))}


def age(folder: StoreFolder, key: ChunkKey, seconds: int) -> None:
    (path,) = folder.path.rglob(f"{key.digest}*.safetensors")
    os.utime(path, (seconds, seconds))


def size(folder: StoreFolder) -> int:
    return sum(folder.size_of(key) for key in folder.keys())  # noqa: SIM118 - not a mapping


def test_every_file_and_folder_is_its_owners_alone(
    tmp_path: Path, make_record: Make, context: KVContext, open_umask: None
) -> None:
    folder = StoreFolder(tmp_path / "new" / "kv", create=True)
    record = make_record(range(20))
    folder.put(record, context=context)
    folder.pin(record.key)
    assert modes(folder.path) == {0o600, 0o700}
    for path in (folder.path, *folder.path.rglob("*")):
        path.chmod(0o777 if path.is_dir() else 0o644)
    folder.sweep()
    assert modes(folder.path) == {0o600, 0o700}


def test_the_budget_holds_at_every_write_and_the_longest_unused_go_first(
    tmp_path: Path, make_record: Make
) -> None:
    records = [make_record(range(n, n + 20)) for n in range(0, 3000, 100)]
    probe = StoreFolder(tmp_path / "probe", create=True)
    probe.put(records[0])
    budget = int(5.5 * size(probe))
    folder = StoreFolder(tmp_path / "kv", create=True, byte_budget=budget)
    other = StoreFolder(folder.path, byte_budget=budget)  # as another process has it
    for number, record in enumerate(records):
        (folder if number % 3 else other).put(record)
        age(folder, record.key, 1000 + number)
        if number == 4:
            folder.pin(records[3].key)
        folder.used([records[1].key] if number < 10 else [])
        assert size(folder) <= budget
    left = set(folder.keys())
    assert records[3].key in left
    assert records[-1].key in left
    assert len(left) >= 4
    assert records[1].key in left  # used later than most were written
    assert not StoreFolder(folder.path, byte_budget=10).put(records[0])


def test_what_a_crash_left_is_seen_and_swept_while_a_living_writer_is_left_alone(
    tmp_path: Path, make_record: Make
) -> None:
    folder = StoreFolder(tmp_path / "kv", create=True)
    record = make_record(range(20))
    folder.put(record)
    (path,) = folder.path.rglob("*.safetensors")
    left, living = (path.with_name(f".{path.name}.{name}.tmp") for name in ("left", "living"))
    left.write_bytes(b"x" * 1000)
    with living.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert folder.unfinished() == (2, 1000)
        assert folder.verify(remove=True) == []
        assert (left.exists(), living.exists()) == (False, True)
    left.write_bytes(b"x" * 1000)
    folder.trim(1 << 30)
    assert folder.unfinished() == (0, 0)


def test_a_writer_whose_temporary_file_was_swept_writes_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = fcntl.flock

    def swept_before_the_lock(file: object, flags: int) -> None:
        monkeypatch.setattr(fcntl, "flock", real)
        for path in tmp_path.glob(".*.tmp"):
            path.unlink()
        real(file, flags)  # type: ignore[arg-type]

    monkeypatch.setattr(fcntl, "flock", swept_before_the_lock)
    write_private(tmp_path / "file", b"content")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"content"


def test_only_what_can_be_used_is_read_and_the_latest_first(
    tmp_path: Path, make_record: Make, context: KVContext
) -> None:
    folder = StoreFolder(tmp_path / "kv", create=True)
    others = [
        dataclasses.replace(context, model_fingerprint="another"),
        dataclasses.replace(context, tp_size=2, tp_rank=1),
        dataclasses.replace(context, tenant="acme"),
    ]
    for other in others:
        folder.put(make_record(range(30), in_context=other), context=other)
    mine = [make_record(range(n, n + 20)) for n in range(0, 600, 100)]
    for number, record in enumerate(mine):
        folder.put(record, context=context)
        age(folder, record.key, 1000 + (number * 5) % 6)
    fields = context.to_json()
    del fields["prefix_digest"]
    store = MemoryStore(3 * mine[0].num_bytes)
    restarted = StoreFolder(folder.path)
    report = load_store(restarted, store, namespaces=restarted.namespaces(fields))
    assert (report.loaded, report.no_room, report.foreign) == (3, 3, 3)
    latest = sorted(range(6), key=lambda number: -((number * 5) % 6))[:3]
    assert set(store.keys()) == {mine[number].key for number in latest}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS], ids=errno.errorcode.get)
def test_a_write_that_fails_at_any_call_leaves_the_old_record_or_the_new_one(
    code: int, tmp_path: Path, make_record: Make, context: KVContext
) -> None:
    record = make_record(range(20))
    for nth in range(100):
        folder = StoreFolder(tmp_path / str(nth), create=True)
        fault = Fault(kinds=CHANGES, nth=nth, errno=code)
        with DiskCalls(folder.path, fault=fault) as disk, contextlib.suppress(OSError):
            folder.put(record, context=context)
        if not disk.failed:
            break
        assert folder.unfinished() == (0, 0)
        assert folder.verify() == []
        assert folder.put(record, context=context)
        assert folder.get(record.key, record.token_ids) is not None
    assert nth > 3


def test_use_in_memory_is_noted_on_the_files(
    tmp_path: Path, make_record: Make, context: KVContext
) -> None:
    folder = StoreFolder(tmp_path / "kv", create=True)
    records = [make_record(range(n, n + 20)) for n in range(0, 300, 100)]
    now = [0.0]
    store = MemoryStore(1 << 30, clock=lambda: now[0])
    for record in records:
        folder.put(record, context=context)
        age(folder, record.key, 1000)
        store.put(record)
    now[0] = 10.0
    lease = store.acquire(records[1].key, records[1].token_ids)
    assert lease is not None
    folder.used(store.used_since(5.0))
    small = MemoryStore(2 * records[0].num_bytes - 1)
    assert load_store(folder, small).loaded == 1
    assert small.keys() == [records[1].key]


def test_erasing_drops_what_is_pinned_and_what_is_in_use(make_record: Make) -> None:
    records = [make_record(range(n, n + 20)) for n in range(0, 300, 100)]
    store = MemoryStore(1 << 30)
    for record in records:
        store.put(record)
    store.pin(records[0].key)
    lease = store.acquire(records[1].key, records[1].token_ids)
    assert lease is not None
    assert store.erase([record.key for record in records[:2]]) == 2
    assert store.keys() == [records[2].key]
    store.check_integrity()
    lease.release()
    store.check_integrity(expect_idle=True)
    assert store.stats().bytes_now == records[2].num_bytes


def test_a_record_that_is_removed_while_it_is_replaced_is_counted_once(
    tmp_path: Path, make_record: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted twice, the folder would seem emptier than it is, and outgrow its budget."""
    folder = StoreFolder(tmp_path / "kv", create=True)
    record, other = make_record(range(8)), make_record(range(20, 28))
    for one in (record, other):
        folder.put(one)
    publish, removed = Draft.publish, threading.Event()

    def remove() -> None:
        folder.remove(record.key)
        removed.set()

    def meanwhile(draft: Draft, *args: Any) -> None:
        if draft.path == chunk_path(folder.path, record.key):
            threading.Thread(target=remove).start()
            removed.wait(0.5)
        publish(draft, *args)

    monkeypatch.setattr(Draft, "publish", meanwhile)
    folder.put(record)
    assert removed.wait(60)
    weight = sum(path.stat().st_size for path in folder.path.rglob("*.safetensors"))
    with locked_usage(usage_path(folder.path)) as usage:
        assert usage.num_bytes == weight
    assert {key: folder.size_of(key) > 0 for key in (record.key, other.key)} == {
        key: chunk_path(folder.path, key).exists() for key in (record.key, other.key)
    }


@pytest.mark.parametrize("change", ["remove", "pin"])
def test_who_finds_no_figure_counts_nothing_into_a_new_one(
    tmp_path: Path, make_record: Make, change: str
) -> None:
    """A figure that begins with a removal would say that the folder is empty."""
    records = [make_record(range(n, n + 8)) for n in range(0, 64, 8)]
    folder = StoreFolder(tmp_path / "kv", create=True)
    folder.put(records[0])
    folder = StoreFolder(tmp_path / "kv", byte_budget=4 * size(folder))
    for record in records[:4]:
        folder.put(record)
    usage_path(folder.path).unlink()
    assert folder.remove(records[0].key) if change == "remove" else folder.pin(records[0].key)
    for record in records[4:]:
        folder.put(record)
        weight = sum(path.stat().st_size for path in folder.path.rglob("*.safetensors"))
        assert weight <= folder.budget.byte_budget


def test_a_call_that_writes_little_is_followed_by_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writev, calls = os.writev, list[int]()

    def little(descriptor: int, views: Any) -> int:
        calls.append(len(views))
        return writev(descriptor, [views[0][:3]])

    monkeypatch.setattr(os, "writev", little)
    parts = [b"ab", b"", bytearray(b"cdefg"), *([b"h"] * 2000)]
    draft = Draft(tmp_path / "file", 2007)
    draft.write(parts)
    draft.publish()
    assert (tmp_path / "file").read_bytes() == b"".join(parts)
    assert max(calls) <= os.sysconf("SC_IOV_MAX")


@pytest.mark.parametrize(
    ("number", "is_full"), [(errno.EOPNOTSUPP, False), (errno.ENOSYS, False), (errno.ENOSPC, True)]
)
def test_a_file_system_that_cannot_allocate_gets_a_long_file_and_a_full_one_says_so(
    number: int, is_full: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        ctypes.set_errno(number)
        return -1

    monkeypatch.setattr(allocate, "_fallocate", lambda: refuse)
    if is_full:
        with pytest.raises(OSError, match=os.strerror(number)):
            Draft(tmp_path / "file", 10_000)
        assert list(tmp_path.iterdir()) == []
    else:
        draft = Draft(tmp_path / "file", 10_000)
        assert [path.stat().st_size for path in tmp_path.iterdir()] == [10_000]
        draft.discard()
