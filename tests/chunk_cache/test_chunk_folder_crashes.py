"""Processes that are killed while they write, that write the same, and a disk that is really full."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from store_writing import CONTEXT, NUMBER, check, forking, record, write_on

from chunk_cache import StoreFolder
from chunk_cache.tiers.disk.usage import locked_usage

KINDS = (".safetensors", ".tmp")
KILLS = int(os.environ.get("STORE_KILLS", "24"))
"""More by hand: ``STORE_KILLS=200 pytest tests/chunk_cache/test_chunk_folder_crashes.py``."""


def weight(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.suffix in KINDS)


def size_of_largest(tmp_path: Path) -> int:
    probe = StoreFolder(tmp_path / "probe", create=True)
    for number in range(NUMBER):
        probe.put(record(number))
    return max(probe.size_of(key) for key in probe.keys())  # noqa: SIM118 - not a mapping


def test_a_killed_writer_leaves_a_store_that_is_right_and_within_its_budget(tmp_path: Path) -> None:
    chance = random.Random(7)
    processes = forking()
    folder, budget = tmp_path / "kv", 9 * size_of_largest(tmp_path)
    StoreFolder(folder, create=True)
    bystander = StoreFolder.connect(str(folder), byte_budget=budget, model="")
    found = left = kill = 0
    # A record is written in a few milliseconds: go on until a kill has met one that was.
    while kill < KILLS or (not left and kill < 5 * KILLS):
        kill += 1
        ready = processes.Event()
        child = processes.Process(target=write_on, args=(folder, budget, kill, ready))
        child.start()
        assert ready.wait(120)
        time.sleep(chance.uniform(0, 0.03))
        child.kill()
        child.join()
        assert weight(folder) <= budget
        left += bystander.unfinished()[0]
        if kill % 2:
            # A server that lives on finds what is there, and makes room of what was left.
            assert bystander.verify() == []
            for number in range(NUMBER):
                bystander.put(record(number), context=CONTEXT)
                assert weight(folder) <= budget
        store = StoreFolder.connect(str(folder), byte_budget=budget, model="")
        assert store.unfinished() == (0, 0)
        assert store.verify() == []
        found += check(store)
        with locked_usage(folder / "usage") as usage:
            assert usage.num_bytes == weight(folder) <= budget
    assert found > 3 * kill
    assert left or KILLS < 20


def test_processes_that_write_and_delete_the_same_records_never_show_a_wrong_one(
    tmp_path: Path,
) -> None:
    processes = forking()
    folder, budget = tmp_path / "kv", 7 * size_of_largest(tmp_path)
    StoreFolder(folder, create=True)
    writers = [
        processes.Process(target=write_on, args=(folder, budget, seed, None, 150))
        for seed in range(2)
    ]
    for writer in writers:
        writer.start()
    reader = StoreFolder(folder, byte_budget=budget)
    found = 0
    while any(writer.is_alive() for writer in writers):
        found += check(reader)
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert found > 0
    store = StoreFolder(folder, byte_budget=budget)
    with locked_usage(folder / "usage") as usage:
        assert usage.num_bytes == weight(folder) <= budget
    assert store.verify() == []
    assert store.unfinished() == (0, 0)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real disk of 256 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
    except OSError as error:
        pytest.skip(f"needs `mount`: {error}")
    if done.returncode:
        pytest.skip(f"needs the right to mount a file system: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_refuses_a_record_keeps_the_others_and_works_again(small_disk: Path) -> None:
    store = StoreFolder.connect(str(small_disk / "kv"), byte_budget=1 << 30, model="")
    filler = small_disk / "filler"
    filler.write_bytes(b"x" * (100 << 10))
    written, refused = [], []
    for number in range(NUMBER):
        try:
            assert store.put(record(number), context=CONTEXT)
            written.append(number)
        except OSError as error:
            refused.append(error.errno)
    assert len(written) > 1
    assert set(refused) == {errno.ENOSPC}
    assert store.unfinished() == (0, 0)
    assert store.verify() == []
    assert check(store) == len(written)
    with locked_usage(store.path / "usage") as usage:
        assert usage.num_bytes == weight(store.path)
    filler.unlink()
    assert store.put(record(NUMBER - 1), context=CONTEXT)
    assert check(StoreFolder(store.path)) == len(written) + 1
