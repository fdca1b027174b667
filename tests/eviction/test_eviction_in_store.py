"""The memory store with each policy: whose records go, what a queue hint changes, and that the books stay in order."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from chunk_cache import Build, ChunkKV, ChunkState, MemoryStore
from chunk_cache.eviction import WaitingJob, create_eviction
from chunk_cache.eviction.lookahead import LookAheadPolicy
from tests.chunk_cache.conftest import clock, context, make_record, make_store

__all__ = ["clock", "context", "make_record", "make_store"]
Make = Callable[..., ChunkKV]
MakeStore = Callable[..., MemoryStore]


@pytest.fixture
def records(make_record: Make) -> list[ChunkKV]:
    return [make_record(range(100 * n, 100 * n + 10)) for n in range(12)]


def put(store: MemoryStore, record: ChunkKV, tenant: str = "") -> bool:
    return store.put(record, tenant=tenant)


def held(store: MemoryStore, records: list[ChunkKV]) -> list[int]:
    return [n for n, record in enumerate(records) if store.state(record.key) is ChunkState.READY]


def looking_ahead(
    make_store: MakeStore, records: list[ChunkKV], room: int, **options: object
) -> MemoryStore:
    budget = room * records[0].num_bytes
    options = {"watermark": 0.0, "disk_bytes": 10 * budget} | options
    policy = LookAheadPolicy(memory_bytes=budget, **options)  # type: ignore[arg-type]
    return make_store(budget, eviction=policy)


def waits(name: str, *records: ChunkKV) -> WaitingJob:
    return WaitingJob(name, tuple(record.key for record in records))


def test_what_a_request_waits_for_stays(make_store: MakeStore, records: list[ChunkKV]) -> None:
    store = looking_ahead(make_store, records, 4)
    for record in records[:4]:
        assert put(store, record)
    assert store.note_waiting([waits("a", records[0]), waits("b", records[1])]) == []
    for record in records[4:8]:
        assert put(store, record)
    assert held(store, records) == [0, 1, 6, 7]
    assert store.note_waiting([]) == []  # they ran
    for record in records[8:10]:
        assert put(store, record)
    assert held(store, records) == [6, 7, 8, 9]


def test_where_all_is_awaited_the_tail_of_the_queue_loses(
    make_store: MakeStore, records: list[ChunkKV]
) -> None:
    store = looking_ahead(make_store, records, 3)
    for record in records[:3]:
        assert put(store, record)
    store.note_waiting([waits("a", records[1]), waits("b", records[0]), waits("c", records[2])])
    assert put(store, records[3])
    assert held(store, records) == [0, 1, 3]


def test_the_hint_tells_what_is_worth_fetching(
    make_store: MakeStore, records: list[ChunkKV]
) -> None:
    store = looking_ahead(make_store, records, 4)
    assert store.uses_queue
    assert put(store, records[1])
    build = store.begin_build(records[2].key, records[2].token_ids)
    jobs = [waits("a", records[1], records[3]), waits("b", records[2], records[3], records[4])]
    # One record is there and one is under way. Jobs of 2 and 3 records: the prefetch window holds 4 / 2.5 jobs.
    assert store.note_waiting(jobs) == [records[3].key]
    assert isinstance(build, Build)
    build.abort(failed=False)
    store.note_waiting([])
    assert store.note_waiting(jobs[1:]) == [r.key for r in (records[2], records[3], records[4])]


def test_a_policy_without_a_queue_looks_at_no_job(
    make_store: MakeStore, records: list[ChunkKV]
) -> None:
    store = make_store()

    def never() -> Iterator[WaitingJob]:
        raise AssertionError("the jobs were looked at")
        yield

    assert not store.uses_queue
    assert store.note_waiting(never()) == []


@pytest.mark.parametrize("name", ["lru", "lfu", "fifo", "lookahead", "lookahead:ttl"])
def test_who_holds_most_loses_first_whatever_the_policy(
    name: str, make_store: MakeStore, records: list[ChunkKV]
) -> None:
    budget = 6 * records[0].num_bytes
    store = make_store(budget, eviction=create_eviction(name, memory_bytes=budget))
    for n in range(4):
        assert put(store, records[n], "loop")
    assert put(store, records[4], "quiet")
    # Even what others wait for: a hint gives no tenant a larger share.
    store.note_waiting([waits("a", *records[:4])])
    for n in range(6, 12):
        assert put(store, records[n], "loop")
        store.check_integrity()
    assert 4 in held(store, records)


def test_fifo_ignores_use_and_lfu_counts_it(make_store: MakeStore, records: list[ChunkKV]) -> None:
    budget = 3 * records[0].num_bytes
    for name, left in (("fifo", [1, 2, 3]), ("lfu", [0, 1, 3]), ("lru", [0, 1, 3])):
        store = make_store(budget, eviction=create_eviction(name, memory_bytes=budget))
        for record in records[:3]:
            assert put(store, record)
        for n in (0, 1, 0):
            lease = store.acquire(records[n].key, records[n].token_ids)
            assert lease is not None
            lease.release()
        assert put(store, records[3])
        assert held(store, records) == left, name


def test_a_reserve_is_kept_free_as_far_as_leases_allow(
    make_store: MakeStore, records: list[ChunkKV]
) -> None:
    store = looking_ahead(make_store, records, 4, watermark=0.5)
    size = records[0].num_bytes
    for record in records[:4]:
        assert put(store, record)
        assert store.free_bytes >= 2 * size
    assert held(store, records) == [2, 3]
    leases = [store.acquire(records[n].key, records[n].token_ids) for n in (2, 3)]
    # Room that is there is used, though the reserve cannot be kept.
    for n in (4, 5):
        assert put(store, records[n])
        leases.append(store.acquire(records[n].key, records[n].token_ids))
    assert held(store, records) == [2, 3, 4, 5]
    assert not put(store, records[6])
    for lease in leases:
        assert lease is not None
        lease.release()


def test_hints_of_many_threads_beside_uses(make_store: MakeStore, records: list[ChunkKV]) -> None:
    store = looking_ahead(make_store, records, 5)
    faults: list[BaseException] = []

    def work(offset: int) -> None:
        try:
            for turn in range(150):
                one, two = records[(turn + offset) % 12], records[(turn * 5 + offset) % 12]
                put(store, one)
                store.note_waiting([waits(f"{offset}-{turn}", two), waits(f"{turn}", one)])
                lease = store.acquire(two.key, two.token_ids)
                if lease is not None:
                    lease.release()
                if turn % 40 == 0:
                    store.erase([one.key])
        except BaseException as fault:
            faults.append(fault)

    threads = [threading.Thread(target=work, args=(offset,)) for offset in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    store.check_integrity(expect_idle=True)
