"""Pinned entries of a store folder: they survive every eviction and come first into memory."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from chunk_cache import ChunkCacheError, ChunkKey, ChunkKV, MemoryStore, StoreFolder, load_store
from rag_pipeline.cli import main

Make = Callable[..., ChunkKV]
MakeStore = Callable[..., MemoryStore]


@pytest.fixture
def records(make_record: Make) -> list[ChunkKV]:
    return [make_record(range(n, n + 70)) for n in range(0, 500, 100)]


@pytest.fixture
def folder(tmp_path: Path, records: list[ChunkKV]) -> StoreFolder:
    """Five records, each written a second after the one before."""
    made = StoreFolder(tmp_path / "kv", create=True)
    for age, record in enumerate(records):
        made.put(record)
        (file,) = made.path.rglob(f"{record.key.digest}*.safetensors")
        os.utime(file, (1e9 + age, 1e9 + age))
    return made


def pass_time(monkeypatch: pytest.MonkeyPatch, seconds: float, *, jump_s: float = 0.0) -> None:
    """Let so many seconds pass on every clock, and the wall clock be set besides."""
    wall, wall_ns, monotonic = time.time, time.time_ns, time.monotonic
    shift = seconds + jump_s
    monkeypatch.setattr(time, "time", lambda: wall() + shift)
    monkeypatch.setattr(time, "time_ns", lambda: wall_ns() + int(shift * 1e9))
    monkeypatch.setattr(time, "monotonic", lambda: monotonic() + seconds)


def keys_of(folder: StoreFolder) -> set[ChunkKey]:
    return set(folder.keys())


def test_a_pin_belongs_to_its_record_and_every_process_sees_it(
    folder: StoreFolder, records: list[ChunkKV], make_record: Make
):
    key = records[1].key
    assert folder.pin(key)
    assert folder.pin(key)
    other = StoreFolder(folder.path)
    assert [k for k in other.keys() if other.is_pinned(k)] == [key]  # noqa: SIM118
    assert not folder.pin(make_record(range(9)).key)  # absent: nothing to pin, and no file left
    folder.put(records[1])  # written again: still pinned
    assert folder.is_pinned(key)
    assert not folder.evict(key)
    assert folder.evict(records[0].key)
    assert other.unpin(key)
    assert not other.unpin(key)
    assert folder.evict(key)
    assert not folder.evict(key)
    folder.pin(records[2].key)
    assert folder.evict(records[2].key, force=True)
    folder.put(records[2])
    assert not folder.is_pinned(records[2].key)
    assert list(folder.path.rglob("*.pinned")) == []


def test_trimming_takes_the_oldest_and_leaves_the_pinned(
    folder: StoreFolder, records: list[ChunkKV]
):
    size = folder.size_of(records[0].key)
    folder.pin(records[0].key)
    assert folder.trim(5 * size) == []
    assert folder.trim(3 * size) == [records[1].key, records[2].key]
    assert folder.trim(0) == [records[3].key, records[4].key]
    assert keys_of(folder) == {records[0].key}
    with pytest.raises(ChunkCacheError, match="byte_budget=-1"):
        folder.trim(-1)


def test_pinned_records_come_first_into_memory_and_stay_there(
    folder: StoreFolder, records: list[ChunkKV], make_store: MakeStore, make_record: Make
):
    last = sorted(folder.keys(), key=lambda k: k.digest)[-1]
    folder.pin(last)
    size = records[0].num_bytes
    store = make_store(size + max(size, folder.size_of(last)))
    report = load_store(folder, store)
    assert (report.loaded, report.no_room) == (2, 3)
    assert store.stats().pinned_bytes_now == size
    for n in range(1000, 1500, 100):
        assert store.put(make_record(range(n, n + 70)))
    assert store.state(last) is not None
    assert store.clear() > 0
    assert store.keys() == [last]


def test_an_import_evicts_nothing_when_only_the_book_keeping_does_not_fit(
    folder: StoreFolder, records: list[ChunkKV], make_store: MakeStore
):
    size, on_disk = records[0].num_bytes, folder.size_of(records[0].key)
    assert size > on_disk
    store = make_store(size + on_disk)
    assert load_store(folder, store).loaded == 1
    assert store.stats().evicted == 0


def test_what_is_in_memory_already_is_pinned_by_an_import(
    folder: StoreFolder, records: list[ChunkKV], make_store: MakeStore
):
    store = make_store()
    store.put(records[3])
    folder.pin(records[3].key)
    assert load_store(folder, store).already_there == 1
    assert not store.evict(records[3].key)


def test_a_damaged_record_is_removed_though_pinned(folder: StoreFolder, records: list[ChunkKV]):
    folder.pin(records[0].key)
    (file,) = folder.path.rglob(f"{records[0].key.digest}*.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    assert folder.verify(remove=True) == [records[0].key]
    assert not folder.is_pinned(records[0].key)


def run(words: list[str], folder: StoreFolder, capsys: pytest.CaptureFixture[str]) -> dict:
    assert main(["cache", *words, "--store", str(folder.path), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_command_line_pins_unpins_and_spares(
    folder: StoreFolder, records: list[ChunkKV], capsys: pytest.CaptureFixture[str]
):
    one, two, three = (record.key.digest for record in records[:3])
    report = run(["pin", one[:12], two], folder, capsys)
    assert set(report["pinned"]) == {one, two}
    assert (report["pinned_chunks"], report["chunks"]) == (2, 5)
    assert report["pinned_bytes"] == 2 * folder.size_of(records[0].key)
    shown = {entry["key"]: entry["pinned"] for entry in run(["ls"], folder, capsys)["entries"]}
    assert {key for key, pinned in shown.items() if pinned} == {one, two}

    report = run(["evict", one, three], folder, capsys)
    assert (report["evicted"], report["pinned_kept"]) == ([three], [one])
    report = run(["evict", "--max-bytes", "0"], folder, capsys)
    assert len(report["evicted"]) == 2
    assert set(report["pinned_kept"]) == {one, two}
    assert report["chunks"] == 2

    assert main(["cache", "evict", "--key", one, "--store", str(folder.path)]) == 1
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert one[:16] in line
    assert "cache unpin" in line
    assert run(["unpin", one], folder, capsys)["unpinned"] == [one]
    assert run(["evict", "--key", one], folder, capsys)["evicted"] == [one]

    assert main(["cache", "ls", "--store", str(folder.path)]) == 0
    text = capsys.readouterr().out.splitlines()
    assert text[0].startswith(two[:16])
    assert text[0].endswith("pinned")


@pytest.mark.parametrize("words", [["pin", "zz"], ["pin", ""], ["unpin", "zz"], ["evict", "zz"]])
def test_an_unknown_key_is_one_line_and_nothing_happens(
    words: list[str], folder: StoreFolder, capsys: pytest.CaptureFixture[str]
):
    before = keys_of(folder)
    first = next(folder.keys()).digest
    assert main(["cache", *words, first, "--store", str(folder.path)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert repr(words[-1]) in captured.err
    assert "cache ls" in captured.err
    assert keys_of(folder) == before
    assert list(folder.path.rglob("*.pinned")) == []


def test_a_pin_that_has_ended_holds_nothing_and_no_process_has_to_be_awake_for_it(
    folder: StoreFolder, records: list[ChunkKV], monkeypatch: pytest.MonkeyPatch
):
    one, other = records[0].key, records[1].key
    size = folder.size_of(one)
    now = time.time()
    folder.pin(one, ttl_s=60)
    folder.pin(other)
    assert folder.trim(0) == [record.key for record in records[2:]]
    assert now + 50 < folder.pinned_until(one) < now + 70
    pass_time(monkeypatch, 61)
    reopened = StoreFolder(folder.path)
    assert [key for key in (one, other) if reopened.is_pinned(key)] == [other]
    # Both the process that pinned it and one that found the pin evict the record now.
    assert folder.trim(size) == [one]
    assert reopened.trim(0) == []
    assert [path.stem[:64] for path in folder.path.rglob("*.pinned")] == [other.digest]


DAY_S = 24 * 3600.0


@pytest.mark.parametrize("jump_s", [-DAY_S, DAY_S])
def test_a_wall_clock_that_jumps_ends_no_pin_early_and_keeps_none_for_longer(
    jump_s: float,
    folder: StoreFolder,
    records: list[ChunkKV],
    monkeypatch: pytest.MonkeyPatch,
):
    one = records[0].key
    folder.pin(one, ttl_s=3600)
    pass_time(monkeypatch, 0, jump_s=jump_s)
    assert folder.is_pinned(one)
    assert one not in folder.trim(0)
    assert folder.pinned_until(one) - time.time() == pytest.approx(3600, abs=60)
    pass_time(monkeypatch, 3700)
    assert not folder.is_pinned(one)
    assert folder.trim(0) == [one]


@pytest.mark.parametrize("jump_s", [-DAY_S, DAY_S])
def test_what_was_used_last_stays_though_the_wall_clock_jumps(
    jump_s: float,
    tmp_path: Path,
    records: list[ChunkKV],
    monkeypatch: pytest.MonkeyPatch,
):
    folder = StoreFolder(tmp_path / "new", create=True)
    for record in records[:3]:
        folder.put(record)
    pass_time(monkeypatch, 1, jump_s=jump_s)
    folder.used([records[0].key])
    folder.put(records[3])
    expected = [records[n].key for n in (1, 2, 0, 3)]
    assert folder.keys_by_use() == expected
    assert StoreFolder(folder.path).keys_by_use() == expected, "after a restart too"
    assert folder.trim(2 * folder.size_of(records[0].key)) == expected[:2]


def test_a_pin_ends_in_memory_when_it_ends_on_the_disk(
    folder: StoreFolder, records: list[ChunkKV], monkeypatch: pytest.MonkeyPatch
):
    folder.pin(records[0].key, ttl_s=60)
    folder.pin(records[1].key)
    clock = 100.0
    store = MemoryStore(1 << 20, clock=lambda: clock)
    load_store(folder, store)
    left = {info.key: info.pin_ttl_s for info in store.ls() if info.pinned}
    assert set(left) == {records[0].key, records[1].key}
    assert left[records[1].key] is None
    assert 50 < (left[records[0].key] or 0) <= 60
    assert not store.evict(records[0].key)
    clock = 161.0
    assert store.stats().pins_expired == 1
    store.check_integrity(expect_idle=True)
    assert store.evict(records[0].key)
    assert not store.evict(records[1].key)


def test_pinning_again_sets_another_end(folder: StoreFolder, records: list[ChunkKV]):
    key = records[0].key
    folder.pin(key, ttl_s=60)
    folder.pin(key)
    assert folder.pinned_until(key) == float("inf")
    folder.pin(key, ttl_s=-1)
    assert not folder.is_pinned(key)
    assert not folder.unpin(key)


def test_a_process_remembers_no_pin_that_is_gone(
    folder: StoreFolder, records: list[ChunkKV], monkeypatch: pytest.MonkeyPatch
):
    from chunk_cache.tiers.disk import pins

    monkeypatch.setattr(pins, "_own", {})
    for record in records:
        assert folder.pin(record.key, ttl_s=60)
    assert len(pins._own) == len(records)
    assert folder.unpin(records[0].key)
    assert folder.evict(records[1].key, force=True)
    assert len(pins._own) == len(records) - 2
    pass_time(monkeypatch, 61)
    folder.sweep()  # the walk that tidies the folder
    assert pins._own == {}
    # Pins that others removed are not heard of, so there is a bound besides.
    monkeypatch.setattr(pins, "_MOST_OWN", 3)
    for record in records:
        if folder.contains(record.key):
            assert folder.pin(record.key, ttl_s=60)
    assert len(pins._own) == 3
    kept = [record for record in records if folder.contains(record.key)]
    assert all(folder.is_pinned(record.key) for record in kept)
