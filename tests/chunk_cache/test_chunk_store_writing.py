"""Writing to the memory store: who may build, what may be evicted, what stays."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from chunk_cache import Build, ChunkCacheError, ChunkKV, ChunkState, MemoryStore

Make = Callable[..., ChunkKV]
MakeStore = Callable[..., MemoryStore]


def ids_of(number: int, length: int = 8) -> list[int]:
    return list(range(100 * number, 100 * number + length))


def test_the_least_recently_used_goes_first(make_store: MakeStore, make_record: Make):
    records = [make_record(ids_of(n)) for n in range(4)]
    store = make_store(3 * records[0].num_bytes)
    for record in records[:3]:
        assert store.put(record)
    store.acquire(records[0].key, ids_of(0)).release()  # type: ignore[union-attr]
    assert store.put(records[3])
    assert set(store.keys()) == {records[0].key, records[2].key, records[3].key}
    assert store.stats().evicted == 1
    assert store.match(ids_of(1, 80), records[1].key.namespace) == []


def test_what_is_pinned_or_in_use_is_never_evicted(make_store: MakeStore, make_record: Make):
    records = [make_record(ids_of(n)) for n in range(4)]
    store = make_store(2 * records[0].num_bytes)
    store.put(records[0], pin=True)
    store.put(records[1])
    lease = store.acquire(records[1].key, ids_of(1))
    assert lease is not None
    assert not store.put(records[2])
    assert store.stats().rejected_no_room == 1
    assert set(store.keys()) == {records[0].key, records[1].key}
    lease.release()
    assert store.put(records[2])
    assert set(store.keys()) == {records[0].key, records[2].key}
    assert store.unpin(records[0].key)
    assert store.put(records[3])
    # Letting go of a pin counts as a use, so the other one is the older.
    assert set(store.keys()) == {records[0].key, records[3].key}


def test_nothing_is_evicted_for_a_record_that_would_not_fit_anyway(
    make_store: MakeStore, make_record: Make
):
    small, other = make_record(ids_of(1)), make_record(ids_of(2))
    large = make_record(ids_of(3, 60))
    store = make_store(large.num_bytes)
    assert store.put(small, pin=True)
    assert store.put(other)
    assert not store.put(large)
    assert len(store.keys()) == 2
    huge = make_record(ids_of(4, 90))
    assert not store.put(huge)
    assert store.stats().rejected_too_big == 1
    assert store.state(huge.key) is ChunkState.FAILED


def test_the_second_writer_is_told_that_the_first_is_at_it(
    make_store: MakeStore, make_record: Make
):
    store, record = make_store(), make_record(ids_of(1))
    build = store.begin_build(record.key, ids_of(1), owner="one")
    assert isinstance(build, Build)
    assert store.begin_build(record.key, ids_of(1), owner="two") is ChunkState.BUILDING
    assert store.acquire(record.key, ids_of(1)) is None
    assert build.commit(record)
    assert store.begin_build(record.key, ids_of(1)) is ChunkState.READY
    assert not build.commit(record)
    assert not build.abort()
    stats = store.stats()
    assert (stats.builds_begun, stats.builds_refused, stats.misses_building) == (1, 2, 1)


def test_a_failed_build_may_be_tried_again_after_the_back_off(
    make_store: MakeStore, make_record: Make, clock: object
):
    store, record = make_store(retry_failed_s=30.0), make_record(ids_of(1))
    with (
        pytest.raises(RuntimeError),
        store.begin_build(record.key, ids_of(1)) as build,  # type: ignore[union-attr]
    ):
        raise RuntimeError("out of slots")
    assert not build.commit(record)
    assert store.state(record.key) is ChunkState.FAILED
    assert "out of slots" in store.ls()[0].detail
    assert store.begin_build(record.key, ids_of(1)) is ChunkState.FAILED
    assert store.acquire(record.key, ids_of(1)) is None
    assert store.stats().misses_failed == 1
    clock.now += 30.0  # type: ignore[attr-defined]
    again = store.begin_build(record.key, ids_of(1))
    assert isinstance(again, Build)
    assert again.commit(record)
    assert store.state(record.key) is ChunkState.READY


def test_a_block_left_without_commit_goes_back_to_absent(make_store: MakeStore, make_record: Make):
    store, record = make_store(), make_record(ids_of(1))
    with store.begin_build(record.key, ids_of(1)):  # type: ignore[union-attr]
        pass
    assert store.state(record.key) is None
    assert store.stats().builds_aborted == 1


def test_an_abandoned_build_loses_its_right(
    make_store: MakeStore, make_record: Make, clock: object
):
    store, record = make_store(build_timeout_s=10.0, retry_failed_s=0.0), make_record(ids_of(1))
    late = store.begin_build(record.key, ids_of(1), owner="slow")
    clock.now += 10.0  # type: ignore[attr-defined]
    second = store.begin_build(record.key, ids_of(1), owner="quick")
    assert isinstance(second, Build)
    assert not late.commit(record)  # type: ignore[union-attr]
    assert not late.abort()  # type: ignore[union-attr]
    assert store.state(record.key) is ChunkState.BUILDING
    assert second.commit(record)
    assert store.stats().builds_expired == 1


def test_a_record_of_another_key_is_not_committed(make_store: MakeStore, make_record: Make):
    store, one, two = make_store(), make_record(ids_of(1)), make_record(ids_of(2))
    build = store.begin_build(one.key, ids_of(1))
    assert isinstance(build, Build)
    with pytest.raises(ChunkCacheError, match="committed to the build"):
        build.commit(two)
    with pytest.raises(ChunkCacheError, match="does not belong"):
        store.begin_build(two.key, ids_of(1))
    build.abort(failed=False)


def test_pin_unpin_and_evict_by_hand(make_store: MakeStore, make_record: Make):
    store, record = make_store(), make_record(ids_of(1))
    assert not store.pin(record.key)
    assert not store.evict(record.key)
    store.put(record)
    assert store.pin(record.key)
    assert store.pin(record.key)
    assert store.stats().pinned_bytes_now == record.num_bytes
    assert not store.evict(record.key)
    lease = store.acquire(record.key, ids_of(1))
    assert lease is not None
    assert not store.evict(record.key, force=True)
    lease.release()
    assert store.evict(record.key, force=True)
    assert store.stats().bytes_now == 0
    assert store.stats().pinned_bytes_now == 0


def test_clear_leaves_what_is_pinned_or_in_use(make_store: MakeStore, make_record: Make):
    store = make_store()
    records = [make_record(ids_of(n)) for n in range(4)]
    for record in records:
        store.put(record)
    store.pin(records[0].key)
    with store.acquire(records[1].key, ids_of(1)):  # type: ignore[union-attr]
        assert store.clear() == 2
        assert set(store.keys()) == {records[0].key, records[1].key}


@pytest.mark.parametrize(
    "settings_", [{"byte_budget": 0}, {"build_timeout_s": 0.0}, {"retry_failed_s": -1.0}]
)
def test_settings_that_cannot_work_are_refused(settings_: dict[str, float]):
    with pytest.raises(ChunkCacheError):
        MemoryStore(**{"byte_budget": 10**6, **settings_})  # type: ignore[arg-type]
