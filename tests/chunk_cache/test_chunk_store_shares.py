"""The byte budget is shared evenly by tenants: who would hold most loses its own least recently used records."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from chunk_cache import Build, ChunkKV, ChunkState, MemoryStore

Make = Callable[..., ChunkKV]
MakeStore = Callable[..., MemoryStore]


def build(store: MemoryStore, record: ChunkKV, tenant: str, *, pin: bool = False) -> bool:
    right = store.begin_build(record.key, record.token_ids, tenant=tenant)
    assert isinstance(right, Build)
    return right.commit(record, pin=pin)


@pytest.fixture
def records(make_record: Make) -> list[ChunkKV]:
    return [make_record(range(100 * n, 100 * n + 10)) for n in range(40)]


def held(store: MemoryStore, records: list[ChunkKV]) -> list[int]:
    return [n for n, record in enumerate(records) if store.state(record.key) is ChunkState.READY]


def test_a_loop_of_builds_pushes_out_its_own(make_store: MakeStore, records: list[ChunkKV]):
    store = make_store(8 * records[0].num_bytes)
    for n in range(8):
        assert build(store, records[n], "loop")
    for n in range(8, 11):
        assert build(store, records[n], "quiet")
    assert held(store, records) == [3, 4, 5, 6, 7, 8, 9, 10]
    for n in range(11, 40):
        assert build(store, records[n], "loop")
        store.check_integrity()
    assert held(store, records) == [8, 9, 10, 35, 36, 37, 38, 39]
    # Up to an even share the quiet one still grows, and no further.
    for n in range(11, 17):
        assert build(store, records[n], "quiet")
    assert held(store, records) == [13, 14, 15, 16, 36, 37, 38, 39]


def test_what_is_leased_or_pinned_counts_for_its_tenant_and_stays(
    make_store: MakeStore, records: list[ChunkKV]
):
    store = make_store(4 * records[0].num_bytes)
    for n in range(2):
        assert build(store, records[n], "loop", pin=True)
    lease = store.acquire(records[0].key, records[0].token_ids)
    assert build(store, records[2], "loop")
    assert build(store, records[3], "quiet")
    assert build(store, records[4], "loop")
    assert held(store, records) == [0, 1, 3, 4]
    second = store.acquire(records[4].key, records[4].token_ids)
    assert lease is not None
    assert second is not None
    # All of its own is in use: it gets nothing, and the other loses nothing.
    assert not build(store, records[5], "loop")
    assert held(store, records) == [0, 1, 3, 4]
    lease.release()
    second.release()


def test_a_failed_build_is_absent_again_after_its_back_off(
    make_store: MakeStore, records: list[ChunkKV], clock: object
):
    store = make_store(retry_failed_s=30.0)
    right = store.begin_build(records[0].key, records[0].token_ids)
    assert isinstance(right, Build)
    right.abort("broken")
    assert store.state(records[0].key) is ChunkState.FAILED
    clock.now += 30.0  # type: ignore[attr-defined]
    assert store.state(records[0].key) is None
    assert store.ls() == []
    assert build(store, records[0], "")


def test_a_reset_finds_nothing_again_and_takes_every_right(
    make_store: MakeStore, records: list[ChunkKV]
):
    store = make_store()
    assert build(store, records[0], "a", pin=True)
    assert build(store, records[1], "b")
    lease = store.acquire(records[1].key, records[1].token_ids)
    late = store.begin_build(records[2].key, records[2].token_ids)
    assert isinstance(late, Build)
    assert lease is not None
    store.reset()
    store.check_integrity()
    assert held(store, records) == []
    assert not late.commit(records[2])
    lease.release()
    assert store.stats().bytes_now == 0
    assert build(store, records[1], "b")
