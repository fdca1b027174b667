"""Records that are read from a lower tier while they are used: order, waiting, damage, cost."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from gated_tier import LAYERS, GatedReader, World

from chunk_cache import (
    Build,
    ChunkState,
    DamagedRecordError,
    LoadError,
    layer_wise_seconds,
)


def test_a_record_is_leased_from_its_header_on_and_each_layer_is_waited_for(world: World) -> None:
    record = world.stored(0)
    (fetch,) = world.begin(record)
    assert world.store.state(record.key) is ChunkState.LOADING
    assert [info.state for info in world.store.ls()] == [ChunkState.LOADING]
    assert not world.store.keys()
    lease = world.store.acquire(record.key, record.token_ids)
    assert lease is not None
    assert not fetch.has_layers(1)
    seen: list[int] = []

    def forward() -> None:
        for layer in range(LAYERS):
            assert torch.equal(lease.record.layer(layer, 2, 5).k, record.k[layer, 2:5])
            seen.append(layer)

    thread = threading.Thread(target=forward)
    thread.start()
    for layer in range(LAYERS):
        assert seen == list(range(layer))  # the next one cannot be there
        world.let(1)
        assert world.fetcher.wait(lambda layer=layer: fetch.has_layers(layer + 1), 60)
        while len(seen) == layer:
            thread.join(0.001)
    thread.join(60)
    assert world.fetcher.drain(60)
    assert world.store.state(record.key) is ChunkState.READY
    lease.release()
    with world.store.acquire(record.key, record.token_ids) as whole:
        assert torch.equal(whole.record.v, record.v)
    assert world.store.stats().hits == 2
    assert [one.layer for one in world.timeline.intervals("load")] == list(range(LAYERS))
    assert world.timeline.text().count("\n") == LAYERS


def test_records_that_are_asked_for_together_arrive_layer_by_layer(world: World) -> None:
    one, other = world.stored(0), world.stored(20)
    world.begin(one, other)
    world.let(2 * LAYERS)
    assert world.fetcher.drain(60)
    assert world.far.asked == [(r.key, layer) for layer in range(LAYERS) for r in (one, other)]
    assert set(world.store.keys()) == {one.key, other.key}


def test_what_came_from_below_is_written_to_the_tier_above(world: World) -> None:
    record = world.stored(0)
    world.begin(record)
    world.let(LAYERS)
    assert world.fetcher.drain(60)
    assert world.chain.drain(60)
    assert torch.equal(world.near.records[record.key].k, record.k)
    assert world.counts == {"far.opened": 1, "far.fetched": 1}


def test_the_best_candidate_that_is_there_is_fetched_and_nothing_behind_a_ready_one(
    world: World,
) -> None:
    best, second, third = world.record(0), world.stored(20), world.stored(40)
    (row,) = [[c for (c,) in world.wanted(best, second, third)]]
    world.far.gate.release(LAYERS)
    world.fetcher.begin([row])
    assert world.fetcher.drain(60)
    assert world.store.keys() == [second.key]
    assert world.fetcher.begin([row[1:]]) == []
    assert world.far.asked[-1] == (second.key, LAYERS - 1)


def test_two_requests_share_a_fetch(world: World) -> None:
    record = world.stored(0)
    assert world.begin(record)[0] is world.begin(record)[0]
    world.let(LAYERS)
    assert world.fetcher.drain(60)
    assert len(world.far.asked) == LAYERS


@pytest.mark.parametrize(
    ("fault", "kind", "kept"),
    [(DamagedRecordError("a bit"), "damaged", False), (OSError("gone"), "fetch_failed", True)],
)
def test_a_record_that_fails_in_the_middle_is_a_miss_that_may_be_built_at_once(
    world: World, fault: Exception, kind: str, kept: bool
) -> None:
    record = world.stored(0)
    world.far.fault = fault
    world.begin(record)
    lease = world.store.acquire(record.key, record.token_ids)
    assert lease is not None
    world.let(2)
    with pytest.raises(LoadError, match="layer 1"):
        lease.record.layer(1)
    assert torch.equal(lease.record.layer(0).k, record.k[0])
    assert world.fetcher.drain(60)
    assert world.counts[f"far.{kind}"] == 1
    assert world.store.state(record.key) is None
    # What is damaged is tried by nobody again.
    assert (record.key in world.far.records) == kept
    assert world.store.stats().bytes_now == record.num_bytes  # as long as the lease lasts
    lease.release()
    assert world.store.stats().bytes_now == 0
    build = world.store.begin_build(record.key, record.token_ids)
    assert isinstance(build, Build)
    assert build.commit(record)


def test_a_record_of_other_shapes_is_damage(world: World) -> None:
    wide = world.record(0, heads=3)
    deep = world.make_record(range(20, 28), layers=LAYERS + 1)
    for record in (wide, deep):
        world.far.records[record.key] = record
    world.far.gate.release(10)
    world.fetcher.begin(world.wanted(wide, deep))
    assert world.fetcher.drain(60)
    assert world.counts["far.damaged"] == 2
    assert not world.store.keys()


def test_a_tier_that_opens_another_record_is_not_believed(world: World) -> None:
    """The contract has it compare the tokens; it may be somebody else's code."""
    wanted, other = world.record(0), world.record(20)
    world.far.open = lambda key, token_ids: GatedReader(world.far, other)  # type: ignore[method-assign]
    world.let(LAYERS)
    world.fetcher.begin(world.wanted(wanted))
    assert world.fetcher.drain(60)
    assert not world.store.keys()
    assert world.counts == {"far.damaged": 1}
    assert not world.far.asked


def test_a_reader_that_takes_too_long_is_waited_for_once(world: World) -> None:
    record = world.stored(0)
    world.fetcher._patience_s = 0.01
    world.begin(record)
    lease = world.store.acquire(record.key, record.token_ids)
    assert lease is not None
    with pytest.raises(LoadError, match="too long"):
        lease.record.layer(0)
    lease.release()
    # The next request does not try it, until it is whole.
    assert not world.store.can_lease(record.key)
    assert world.store.acquire(record.key, record.token_ids) is None
    world.let(LAYERS)
    assert world.fetcher.drain(60)
    assert world.store.can_lease(record.key)


def test_the_timeline_of_the_paper() -> None:
    # All is loaded before: computing only. Nothing is, and loading is faster: one load more.
    assert layer_wise_seconds(10, 3.0, 2.0, preloaded=10) == 20.0
    assert layer_wise_seconds(10, 1.0, 2.0) == 21.0
    # Loading is slower: all loads and one computation.
    assert layer_wise_seconds(10, 3.0, 2.0) == 32.0
    times = [layer_wise_seconds(10, 3.0, 2.0, preloaded=k) for k in range(11)]
    assert times == sorted(times, reverse=True)
    for k in range(11):
        end, loaded = 0.0, [max(0, layer + 1 - k) * 3.0 for layer in range(10)]
        for layer in range(10):
            end = max(end, loaded[layer]) + 2.0
        assert times[k] == end


def test_what_is_cheaper_to_compute_stays_where_it_is(world: World) -> None:
    asked: list[tuple[Any, ...]] = []
    world.fetcher._steps._is_worth = lambda *told: bool(asked.append(told))  # never
    record = world.stored(0)
    (fetch,) = world.fetcher.begin(world.wanted(record))
    assert world.fetcher.drain(60)
    assert fetch.is_ended
    assert asked == [("far", record.num_bytes, record.num_tokens, 1)]
    assert world.counts["far.too_slow"] == 1
    assert "far.opened" not in world.counts
    assert world.store.state(record.key) is None  # so that it may be built
    assert record.key in world.far.records


def test_a_record_on_its_way_says_where_it_comes_from(world: World) -> None:
    (fetch,) = world.begin(world.stored(0))
    assert fetch.loading.source == "far"
