"""A record that came back approximate gives way to the exact one, as leases, pins and room allow."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from chunk_cache import Build, ChunkKV, ChunkState, MemoryStore

Make = Callable[..., ChunkKV]


@pytest.fixture
def exact(make_record: Make) -> ChunkKV:
    return make_record(range(100))


@pytest.fixture
def lossy(exact: ChunkKV) -> ChunkKV:
    """The same chunk as a tier gives it back."""
    return dataclasses.replace(exact, k=exact.k + 1, codec="fp8")


def held(store: MemoryStore, record: ChunkKV) -> ChunkKV:
    with store.borrow(record.key) as found:
        assert found is not None
        return found


@pytest.mark.parametrize("slab", [False, True])
def test_the_exact_record_takes_the_place_of_the_approximate_one(
    slab: bool, make_store: Callable[..., MemoryStore], exact: ChunkKV, lossy: ChunkKV
) -> None:
    store = make_store(exact.num_bytes, slab=slab)  # no room beside it
    assert store.put(lossy)
    assert store.ls()[0].codec == "fp8"
    build = store.begin_build(exact.key, exact.token_ids, exact=True)
    assert isinstance(build, Build)
    store.check_integrity()
    assert store.can_lease(exact.key), "it serves until the exact one is there"
    second = store.begin_build(exact.key, exact.token_ids, exact=True)
    assert second is ChunkState.BUILDING, "one writer"
    assert build.commit(exact)
    assert held(store, exact).k.equal(exact.k)
    assert store.ls()[0].codec == exact.codec
    assert store.stats().upgraded == 1
    assert store.stats().bytes_now == exact.num_bytes
    found = store.match(exact.token_ids, exact.key.namespace)
    assert [match.key for match in found] == [exact.key]


def test_nothing_is_put_over_an_exact_record_and_nothing_approximate_over_any(
    make_store: Callable[..., MemoryStore], exact: ChunkKV, lossy: ChunkKV
) -> None:
    store = make_store()
    assert store.put(lossy)
    assert not store.put(lossy)
    assert store.begin_build(lossy.key, lossy.token_ids) is ChunkState.READY
    assert store.put(exact)
    assert not store.put(lossy)
    assert store.begin_build(exact.key, exact.token_ids, exact=True) is ChunkState.READY
    assert held(store, exact).is_lossless


def test_who_has_leased_the_approximate_record_keeps_it_and_it_is_weighed(
    make_store: Callable[..., MemoryStore], exact: ChunkKV, lossy: ChunkKV
) -> None:
    store = make_store(2 * exact.num_bytes)
    store.put(lossy)
    lease = store.acquire(lossy.key, lossy.token_ids)
    assert lease is not None
    with lease:
        assert store.put(exact)
        assert lease.record.layer(0).k.equal(lossy.k[0])
        assert held(store, exact).k.equal(exact.k)
        assert store.stats().bytes_now == 2 * exact.num_bytes
        store.check_integrity()
    assert store.stats().bytes_now == exact.num_bytes


def test_it_stays_where_the_exact_one_has_no_room_beside_it(
    make_store: Callable[..., MemoryStore], exact: ChunkKV, lossy: ChunkKV
) -> None:
    store = make_store(exact.num_bytes)
    store.put(lossy)
    lease = store.acquire(lossy.key, lossy.token_ids)
    assert lease is not None
    with lease:
        assert not store.put(exact)
    assert held(store, lossy).codec == "fp8"
    assert store.put(exact), "later there is"
    assert held(store, exact).is_lossless


def test_a_pin_and_its_end_go_over(
    make_store: Callable[..., MemoryStore], exact: ChunkKV, lossy: ChunkKV, clock: Any
) -> None:
    store = make_store()
    store.put(lossy)
    store.pin(lossy.key, ttl_s=60)
    assert store.put(exact)
    (info,) = store.ls()
    assert (info.pinned, info.pin_ttl_s) == (True, 60)
    clock.now += 61
    assert not store.ls()[0].pinned


@pytest.mark.parametrize("how", ["aborted", "failed", "late", "evicted"])
def test_an_upgrade_that_comes_to_nothing_leaves_the_store_as_it_was(
    how: str, make_store: Callable[..., MemoryStore], exact: ChunkKV, lossy: ChunkKV, clock: Any
) -> None:
    store = make_store()
    store.put(lossy)
    build = store.begin_build(exact.key, exact.token_ids, exact=True)
    assert isinstance(build, Build)
    if how == "late":
        clock.now += 1000
        assert not build.commit(exact)
    elif how == "evicted":
        assert store.evict(lossy.key)
        assert store.state(exact.key) is ChunkState.BUILDING
        assert build.commit(exact)
        assert held(store, exact).is_lossless
        return
    else:
        build.abort("a fault", failed=how == "failed")
    assert store.state(exact.key) is ChunkState.READY
    store.check_integrity(expect_idle=True)
    assert held(store, lossy).codec == "fp8"
    assert store.put(exact)


def test_it_stays_where_a_tensor_of_it_that_outlived_its_lease_is_in_the_way(
    make_store: Callable[..., MemoryStore], exact: ChunkKV, lossy: ChunkKV
) -> None:
    store = make_store(exact.num_bytes, slab=True)
    store.put(lossy)
    store.pin(lossy.key, ttl_s=60)
    lease = store.acquire(lossy.key, lossy.token_ids)
    assert lease is not None
    with lease:
        tensor = lease.record.layer(0).k
    del lease
    assert not store.put(exact)
    store.check_integrity()
    assert held(store, lossy).k.equal(lossy.k)
    assert held(store, lossy).codec == "fp8"
    (info,) = store.ls()
    assert (info.pinned, info.pin_ttl_s, info.hits) == (True, 60, 1)
    assert store.match(exact.token_ids, exact.key.namespace)
    del tensor
    assert store.put(exact)
    store.check_integrity()
    assert held(store, exact).k.equal(exact.k)
    (info,) = store.ls()
    assert (info.pinned, info.pin_ttl_s, info.hits) == (True, 60, 1)


def test_it_stays_where_the_exact_one_cannot_be_copied(
    make_store: Callable[..., MemoryStore],
    exact: ChunkKV,
    lossy: ChunkKV,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = make_store(exact.num_bytes)
    store.put(lossy)

    def refuse(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(store._room, "make", refuse)
    with pytest.raises(MemoryError):
        store.put(exact)
    monkeypatch.undo()
    store.check_integrity()
    assert held(store, lossy).codec == "fp8"
    assert store.put(exact), "nobody holds its right"
