"""Fetches that end before their record is used: for want of room, cancelled, erased, dropped; what they leave."""

from __future__ import annotations

import gc
import weakref

import pytest
from gated_tier import LAYERS, World

from chunk_cache import (
    Build,
)


def test_the_budget_counts_what_is_loading_and_evicts_for_it(world: World) -> None:
    old, new, third, fourth = world.record(40), *map(world.stored, (0, 20, 60))
    world.store._ledger.byte_budget = 2 * old.num_bytes
    assert world.store.put(old)
    world.begin(new, third, fourth)
    assert world.store.state(old.key) is None  # evicted for the second
    assert world.store.stats().bytes_now == 2 * old.num_bytes
    assert world.counts["far.no_memory"] == 1
    assert world.store.state(fourth.key) is None
    world.store.check_integrity()
    world.let(2 * LAYERS)
    assert world.fetcher.drain(60)
    assert set(world.store.keys()) == {new.key, third.key}


def test_a_request_that_still_waits_keeps_no_evicted_record_in_memory(world: World) -> None:
    first, second = world.stored(0), world.stored(20)
    world.store._ledger.byte_budget = first.num_bytes
    world.let(2 * LAYERS)
    (fetch,) = world.begin(first)
    assert world.fetcher.drain(60)
    with world.store.borrow(first.key) as record:
        assert record is not None
        tensor = weakref.ref(record.k)
    del record
    world.fetcher.begin(world.wanted(second))
    assert world.fetcher.drain(60)
    assert world.chain.drain(60)
    world.near.records.clear()
    gc.collect()
    assert world.store.keys() == [second.key]
    assert fetch.is_ended
    assert tensor() is None  # its bytes count for nobody any more


@pytest.mark.parametrize("how", ["no room", "computed", "erased", "whole", "cleared"])
def test_a_reader_is_closed_when_its_fetch_ends_however_it_ends(world: World, how: str) -> None:
    """One that fetches ahead would go on to read what nobody wants."""
    record = world.stored(0)
    if how == "no room":
        world.store._ledger.byte_budget = 1
    elif how == "computed":
        build = world.store.begin_build(record.key, record.token_ids)
        assert isinstance(build, Build)
    elif how == "erased":
        world.erased = {record.key}
    world.begin(record)
    if how == "cleared":
        world.fetcher.clear()
    world.let(LAYERS)
    assert world.fetcher.drain(60)
    assert world.far.closed == [record.key]
    if how == "computed":
        build.abort(failed=False)


def test_a_chunk_that_somebody_computes_meanwhile_is_not_fetched(world: World) -> None:
    record = world.stored(0)
    build = world.store.begin_build(record.key, record.token_ids)
    assert isinstance(build, Build)
    world.begin(record)
    assert world.counts["far.superseded"] == 1
    assert build.commit(record)
    assert not world.far.asked


@pytest.mark.parametrize("how", ["erase", "asked", "reset", "clear"])
def test_nothing_comes_back_from_a_fetch_in_flight(world: World, how: str) -> None:
    record = world.stored(0)
    world.begin(record)
    if how == "erase":  # and the notice is no longer in force when the tier answers
        world.erased = {record.key}
        world.fetcher.erase()
        world.erased = set()
    elif how == "asked":
        world.erased = {record.key}
    elif how == "reset":
        world.store.reset()
    else:
        world.fetcher.clear()
    world.let(LAYERS)
    assert world.fetcher.drain(60)
    assert world.chain.drain(60)
    assert not world.store.keys()
    assert not world.near.records
    assert world.counts["far.fetched"] == 0
    ended = {"erase": "erased", "asked": "erased", "reset": "superseded", "clear": "cancelled"}
    assert world.counts == {"far.opened": 1, f"far.{ended[how]}": 1}


def test_what_is_dropped_when_it_has_just_come_was_cancelled_and_not_erased(world: World) -> None:
    record = world.stored(0)
    world.begin(record)
    world.let(LAYERS - 1)
    assert world.fetcher.wait(lambda: len(world.far.asked) == LAYERS, 60)
    world.fetcher.clear()  # while the last layer is read
    world.let(1)
    assert world.fetcher.drain(60)
    assert world.counts == {"far.opened": 1, "far.cancelled": 1}


def test_what_is_erased_is_not_even_leased(world: World) -> None:
    record = world.stored(0)
    world.erased = {record.key}
    world.begin(record)
    assert world.counts == {"far.erased": 1}
    assert world.store.acquire(record.key, record.token_ids) is None


def test_more_than_the_queue_holds_is_a_miss(world: World) -> None:
    world.fetcher._max_waiting = 1
    first, second = world.stored(0), world.stored(20)
    assert len(world.begin(first)) == 1
    assert world.fetcher.begin(world.wanted(second)) == []
    assert world.counts[".fetch_dropped"] == 1
