"""What a process knows of a store's folder: right after a restart and beside other processes, and without walks."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chunk_cache import ChunkCacheError, ChunkKey, ChunkKV, KVContext, StoreFolder
from chunk_cache.tiers.disk import usage as counting
from chunk_cache.tiers.disk.usage import locked_usage
from rag_eval.io_faults import CHANGES, DiskCalls, Fault

Make = Callable[..., ChunkKV]


@pytest.fixture
def records(make_record: Make) -> list[ChunkKV]:
    return [make_record(range(n, n + 20)) for n in range(0, 4000, 100)]


def weight(folder: Path) -> int:
    """Bytes of everything but the small files beside the records."""
    paths = [path for path in folder.rglob("*") if path.suffix in (".safetensors", ".tmp")]
    return sum(path.stat().st_size for path in paths)


def counted(folder: StoreFolder) -> int:
    with locked_usage(folder.path / "usage") as usage:
        assert usage.is_known
        return usage.num_bytes


def size_of(record: ChunkKV, tmp_path: Path) -> int:
    probe = StoreFolder(tmp_path / "probe", create=True)
    probe.put(record)
    return probe.size_of(record.key)


def in_context(make_record: Make, context: KVContext, numbers: range) -> list[ChunkKV]:
    return [make_record(range(n, n + 20), in_context=context) for n in numbers]


def test_a_restart_finds_the_same_records_in_the_same_order(
    tmp_path: Path, records: list[ChunkKV], context: KVContext
) -> None:
    chance = random.Random(0)
    budget = 25 * size_of(records[0], tmp_path)
    folder = StoreFolder.connect(str(tmp_path / "kv"), byte_budget=budget, model="")
    for _ in range(200):
        record = chance.choice(records)
        change = chance.choice(["put", "put", "put", "used", "remove", "pin", "unpin", "get"])
        if change == "put":
            folder.put(record, context=context)
        elif change == "used":
            folder.used([record.key])
        elif change == "get":
            folder.get(record.key, record.token_ids)
        else:
            getattr(folder, change)(record.key)
        assert weight(folder.path) == counted(folder) <= budget
    before = folder.keys_by_use()
    assert len(before) > 15
    again = StoreFolder.connect(str(folder.path), byte_budget=budget, model="")
    assert again.keys_by_use() == before
    assert list(again.keys()) == list(folder.keys()) == sorted(before, key=lambda key: key.digest)
    known, anew = folder.budget.index(), again.budget.index()
    assert {key: known.get(key) for key in before} == {key: anew.get(key) for key in before}
    assert known._bytes_of == anew._bytes_of
    assert {share: list(turns) for share, turns in known._turns.items()} == {
        share: list(turns) for share, turns in anew._turns.items()
    }


def test_nothing_walks_over_the_folder_of_a_process_that_is_alone(
    tmp_path: Path, records: list[ChunkKV], monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = 10 * size_of(records[0], tmp_path)
    folder = StoreFolder.connect(str(tmp_path / "kv"), byte_budget=budget, model="")
    walks: list[object] = []
    real = os.scandir

    def scandir(path: Any = ".") -> Any:
        # A thread that another test's engine has left looks into folders of its own.
        if isinstance(path, int) or str(path).startswith(str(tmp_path)):
            walks.append(path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    for record in records:
        assert folder.put(record)
        folder.used([record.key])
        folder.pin(record.key)
        folder.unpin(record.key)
        assert folder.size_of(record.key) > 0
        folder.keys_by_use()
        list(folder.keys())
    folder.remove(records[-1].key)
    assert walks == []
    assert len(folder.keys_by_use()) == 9


def test_what_other_processes_write_and_delete_is_seen(
    tmp_path: Path, records: list[ChunkKV]
) -> None:
    one = StoreFolder.connect(str(tmp_path / "kv"), byte_budget=1 << 20, model="")
    two = StoreFolder.connect(str(tmp_path / "kv"), byte_budget=1 << 20, model="")
    one.put(records[0])
    assert two.contains(records[0].key)
    assert two.open(records[0].key, records[0].token_ids) is not None
    two.put(records[1])
    assert set(one.keys()) == set(two.keys()) == {records[0].key, records[1].key}
    two.remove(records[0].key)
    assert list(one.keys()) == [records[1].key]
    # By hand, which nobody is told of.
    (path,) = one.path.rglob("*.safetensors")
    path.unlink()
    assert one.get(records[1].key, records[1].token_ids) is None
    assert not one.contains(records[1].key)
    two.used([records[1].key])
    assert not two.contains(records[1].key)
    path.parent.rmdir()
    assert one.put(records[2])
    assert two.put(records[3])
    assert set(one.keys()) == {records[2].key, records[3].key}


def test_what_another_process_uses_or_pins_is_not_what_goes(
    tmp_path: Path, records: list[ChunkKV]
) -> None:
    budget = int(3.5 * size_of(records[0], tmp_path))
    one = StoreFolder.connect(str(tmp_path / "kv"), byte_budget=budget, model="")
    for record in records[:3]:
        one.put(record)
    two = StoreFolder(one.path, byte_budget=budget)
    two.used([records[0].key])
    one.put(records[3])
    assert set(one.keys()) == {records[n].key for n in (0, 2, 3)}
    assert two.pin(records[2].key)
    one.put(records[4])
    one.put(records[5])
    assert set(one.keys()) == {records[n].key for n in (2, 4, 5)}


def test_the_budget_counts_what_is_being_written_and_what_a_crash_left(
    tmp_path: Path, records: list[ChunkKV]
) -> None:
    size = size_of(records[0], tmp_path)
    folder = StoreFolder.connect(str(tmp_path / "kv"), byte_budget=3 * size, model="")
    folder.put(records[0])
    draft = folder.budget.begin(records[1].key, size)
    assert draft is not None
    assert weight(folder.path) == counted(folder) == 2 * size
    other = StoreFolder(folder.path, byte_budget=3 * size)
    assert other.put(records[2])
    assert other.put(records[3])  # one of the two goes: what is being written takes its room
    assert weight(folder.path) == 3 * size
    folder.budget.discard(draft)
    assert weight(folder.path) == counted(folder) == 2 * size
    # As if a process was killed: nobody holds the lock of what it left.
    draft = folder.budget.begin(records[1].key, size)
    assert draft is not None
    draft._file.close()
    assert other.put(records[4])
    assert other.unfinished() == (0, 0)
    assert weight(folder.path) == counted(folder) <= 3 * size


def test_a_smaller_budget_is_kept_from_the_start(tmp_path: Path, records: list[ChunkKV]) -> None:
    size = size_of(records[0], tmp_path)
    folder = StoreFolder.connect(str(tmp_path / "kv"), byte_budget=10 * size, model="")
    for record in records[:8]:
        folder.put(record)
    folder.pin(records[0].key)
    smaller = StoreFolder.connect(str(tmp_path / "kv"), byte_budget=3 * size, model="")
    assert set(smaller.keys()) == {records[n].key for n in (0, 6, 7)}
    assert weight(folder.path) == counted(folder) == 3 * size


def test_no_tenant_model_or_rank_is_pushed_out_by_one_that_holds_more(
    tmp_path: Path, make_record: Make, context: KVContext
) -> None:
    mine = in_context(make_record, context, range(0, 300, 100))
    size = size_of(mine[0], tmp_path)
    for changed in (
        {"tenant": "acme"},
        {"model_fingerprint": "another"},
        {"tp_rank": 1, "tp_size": 2},
    ):
        other = dataclasses.replace(context, **changed)
        path = tmp_path / "-".join(changed)
        folder = StoreFolder.connect(str(path), byte_budget=6 * size, model="")
        for record in mine:
            folder.put(record, context=context)
        # However much it writes, under whatever prefix: that is no share of its own.
        for number in range(40):
            space = dataclasses.replace(other, prefix_digest=f"prefix {number % 7}")
            (record,) = in_context(make_record, space, range(number, number + 1))
            assert folder.put(record, context=space)
        assert len(folder.keys_by_use()) == 6
        assert {record.key for record in mine} <= set(folder.keys())
        # The other way round, too, and after a restart.
        folder = StoreFolder.connect(str(path), byte_budget=6 * size, model="")
        for record in in_context(make_record, context, range(5000, 6000, 100)):
            assert folder.put(record, context=context)
        spaces = [key.namespace for key in folder.keys()]  # noqa: SIM118 - not a mapping
        assert spaces.count(context.namespace) == 3
        assert len(spaces) == 6


def test_a_share_that_nobody_uses_any_more_gives_its_room_away(
    tmp_path: Path, make_record: Make, context: KVContext
) -> None:
    old = dataclasses.replace(context, model_fingerprint="last month's")
    past = in_context(make_record, old, range(0, 300, 100))
    size = size_of(past[0], tmp_path)
    folder = StoreFolder.connect(str(tmp_path / "kv"), byte_budget=6 * size, model="")
    for record in past:
        folder.put(record, context=old)
    then = time.time() - 30 * 24 * 3600
    for path in folder.path.rglob("*.safetensors"):
        os.utime(path, (then, then))
    folder = StoreFolder.connect(str(folder.path), byte_budget=6 * size, model="")
    present = in_context(make_record, context, range(0, 600, 100))
    for record in present:
        folder.put(record, context=context)
    assert set(folder.keys()) == {record.key for record in present}


@pytest.mark.parametrize("jump_s", [-10 * 365 * 24 * 3600, 10 * 365 * 24 * 3600])
def test_the_order_of_use_goes_on_when_the_clock_jumps(
    jump_s: int, tmp_path: Path, records: list[ChunkKV], monkeypatch: pytest.MonkeyPatch
) -> None:
    size = size_of(records[0], tmp_path)
    folder = StoreFolder.connect(str(tmp_path / "kv"), byte_budget=4 * size, model="")
    for record in records[:4]:
        folder.put(record)
    real = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: real() + jump_s * 10**9)
    folder.used([records[0].key])
    folder.put(records[4])
    monkeypatch.undo()
    folder.used([records[2].key])
    order = [records[n].key for n in (3, 0, 4, 2)]
    assert folder.keys_by_use() == order
    folder = StoreFolder.connect(str(tmp_path / "kv"), byte_budget=4 * size, model="")
    assert folder.keys_by_use() == order
    folder.put(records[5])
    assert folder.keys_by_use() == [*order[1:], records[5].key]


def test_a_folder_of_an_older_format_is_emptied_by_an_engine_and_refused_by_others(
    tmp_path: Path, records: list[ChunkKV], context: KVContext
) -> None:
    folder = StoreFolder(tmp_path / "kv", create=True)
    folder.put(records[0], context=context)
    folder.pin(records[0].key)
    (folder.path / "store.json").write_text(json.dumps({"format": "rag-chunk-store", "version": 1}))
    with pytest.raises(ChunkCacheError, match=r"version 1: .*empties"):
        StoreFolder(folder.path)
    again = StoreFolder.connect(str(folder.path), byte_budget=1 << 20, model="")
    assert list(again.keys()) == []
    assert list(folder.path.rglob("*.safetensors")) + list(folder.path.rglob("*.pinned")) == []
    assert again.put(records[1])
    assert list(StoreFolder(folder.path).keys()) == [records[1].key]


def test_a_count_of_bytes_that_is_lost_or_wrong_is_made_again(
    tmp_path: Path, records: list[ChunkKV]
) -> None:
    size = size_of(records[0], tmp_path)
    folder = StoreFolder.connect(str(tmp_path / "kv"), byte_budget=4 * size, model="")
    for damage in (b"", b"short", b"\xff" * 16, b"\0" * 16, None):
        usage = folder.path / "usage"
        usage.unlink() if damage is None else usage.write_bytes(damage)
        for record in records[:9]:
            assert StoreFolder(folder.path, byte_budget=4 * size).put(record)
            assert folder.put(record)
            assert weight(folder.path) == counted(folder) <= 4 * size
    assert ChunkKey.of("ab" * 16, [1]) not in set(folder.keys())


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES], ids=errno.errorcode.get)
def test_a_folder_that_became_read_only_is_still_read(
    code: int, tmp_path: Path, records: list[ChunkKV]
) -> None:
    folder = StoreFolder.connect(str(tmp_path / "kv"), byte_budget=1 << 20, model="")
    for record in records[:3]:
        folder.put(record)
    for reading in (folder, StoreFolder(folder.path)):
        fault = Fault(kinds=CHANGES, nth=0, errno=code, lasting=True)
        with DiskCalls(folder.path, fault=fault) as disk:
            assert set(reading.keys()) == {record.key for record in records[:3]}
            assert reading.get(records[0].key, records[0].token_ids) is not None
            reading.used([records[0].key])
            with pytest.raises(OSError, match=os.strerror(code)):
                reading.put(records[3])
        assert disk.failed
        assert len(reading.keys_by_use()) == 3
    assert folder.put(records[3])
    assert weight(folder.path) == counted(folder)


def test_a_process_that_hangs_with_the_lock_costs_writes_only(
    tmp_path: Path, records: list[ChunkKV], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counting, "_WAIT_S", 0.02)
    folder = StoreFolder.connect(str(tmp_path / "kv"), byte_budget=1 << 20, model="")
    folder.put(records[0])
    folder.put(records[1])
    with locked_usage(folder.path / "usage"):
        with pytest.raises(OSError, match="another process holds the lock"):
            folder.put(records[2])
        assert folder.contains(records[0].key)
        assert folder.get(records[0].key, records[0].token_ids) is not None
        assert folder.remove(records[1].key)
        assert set(folder.keys()) == {records[0].key}
    assert folder.unfinished() == (0, 0)
    assert folder.put(records[2])
    assert weight(folder.path) == counted(folder)
