"""A full folder keeps what waiting requests will read, as memory does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from chunk_cache import ChunkKV, MemoryStore, StoreFolder, TierChain
from chunk_cache.eviction import WaitingJob, create_eviction
from chunk_cache.tiers.guard import GuardedTier

Make = Callable[..., ChunkKV]


@pytest.fixture
def records(make_record: Make) -> list[ChunkKV]:
    return [make_record(range(100 + n, 120 + n)) for n in range(6)]


@pytest.fixture
def folder(tmp_path: Path, records: list[ChunkKV]) -> StoreFolder:
    """Has room for three records, and holds the first three, used in that order."""
    made = StoreFolder(tmp_path / "kv", create=True)
    made.put(records[0])
    size = made.size_of(records[0].key)
    made.budget.byte_budget = 3 * size + size // 2
    for record in records[1:3]:
        made.put(record)
    return made


def test_what_nobody_waits_for_goes_first_and_then_what_is_needed_last(
    folder: StoreFolder, records: list[ChunkKV]
) -> None:
    awaited = [records[0].key]
    folder.heed_queue(lambda: awaited)
    assert folder.put(records[3])
    assert set(folder.keys()) == {records[n].key for n in (0, 2, 3)}, "1 is the oldest of the rest"
    awaited[:] = [records[n].key for n in (3, 0, 2)]
    assert folder.put(records[4])
    assert set(folder.keys()) == {records[n].key for n in (0, 3, 4)}, "4 is new; 2 is needed last"
    awaited.clear()
    assert folder.put(records[5])
    assert set(folder.keys()) == {records[n].key for n in (3, 4, 5)}, "then the longest unused"


def test_pins_stand_above_the_queue(folder: StoreFolder, records: list[ChunkKV]) -> None:
    folder.heed_queue(lambda: [records[0].key])
    assert folder.pin(records[1].key)
    assert folder.put(records[3])
    assert set(folder.keys()) == {records[n].key for n in (0, 1, 3)}


def test_the_hints_that_memory_gets_reach_the_folder_of_a_chain(
    folder: StoreFolder, records: list[ChunkKV]
) -> None:
    store = MemoryStore(1 << 20, eviction=create_eviction("lookahead", memory_bytes=1 << 20))
    chain = TierChain({"disk": GuardedTier(folder, name="folder", may_hang=True, is_shared=False)})
    chain.heed_queue(store.awaited_keys)
    store.note_waiting([WaitingJob("a", [records[0].key]), WaitingJob("b", [records[1].key])])
    assert store.awaited_keys() == [records[0].key, records[1].key]
    assert chain.tiers["disk"].put(records[3])
    assert set(folder.keys()) == {records[n].key for n in (0, 1, 3)}
    store.note_waiting([])
    assert store.awaited_keys() == []
    assert chain.close(60)
