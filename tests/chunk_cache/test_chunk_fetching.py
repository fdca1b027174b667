"""Records that are read from a lower tier while they are used: order, waiting, damage, budget, erasure."""

from __future__ import annotations

import gc
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from shelf import Shelf

from chunk_cache import (
    Build,
    Candidate,
    ChunkKey,
    ChunkKV,
    ChunkState,
    DamagedRecordError,
    Fetcher,
    KVContext,
    LoadError,
    MemoryStore,
    RecordForm,
    TierChain,
    Timeline,
    layer_wise_seconds,
)
from rag_eval.slow_reader import SlowReader

Make = Callable[..., ChunkKV]
LAYERS = 4


class GatedReader(SlowReader):
    """A record of which a layer is read when the test lets it, and whose end the test hears of."""

    def __init__(self, tier: GatedTier, record: ChunkKV) -> None:
        super().__init__(record, lambda index: tier.wait_for(record.key, index))
        self.close = lambda: tier.closed.append(record.key)


class GatedTier(Shelf):
    """A shelf whose records are read layer by layer."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Semaphore(0)
        self.asked: list[tuple[ChunkKey, int]] = []
        self.closed: list[ChunkKey] = []
        self.fault: Exception | None = None
        self.fault_at = 1

    def open(self, key: ChunkKey, token_ids: Any) -> GatedReader | None:
        record = self.get(key, token_ids)
        return None if record is None else GatedReader(self, record)

    def wait_for(self, key: ChunkKey, layer: int) -> None:
        self.asked.append((key, layer))
        assert self.gate.acquire(timeout=60)
        if self.fault is not None and layer == self.fault_at:
            raise self.fault


class World:
    """A memory store above two tiers, and one thread that fetches."""

    def __init__(self, make_record: Make, context: KVContext) -> None:
        self.near, self.far = GatedTier(), GatedTier()
        self.store = MemoryStore(10**6)
        self.counts: Counter[str] = Counter()
        self.erased: set[ChunkKey] = set()
        self.timeline = Timeline()
        self.context = context
        self.make_record = make_record
        self.chain = TierChain({"near": self.near, "far": self.far})
        self.fetcher = Fetcher(
            self.chain,
            self.store,
            RecordForm.of(self.record(99)),
            count=lambda tier, kind: self.counts.update([f"{tier}.{kind}"]),
            is_erased=lambda record, tenant: record.key in self.erased,
            timeline=lambda: self.timeline,
            threads=1,
            patience_s=30.0,
        )

    def record(self, start: int, **options: Any) -> ChunkKV:
        return self.make_record(range(start, start + 8), layers=LAYERS, **options)

    def stored(self, start: int) -> ChunkKV:
        record = self.record(start)
        self.far.records[record.key] = record
        return record

    def wanted(self, *records: ChunkKV) -> list[list[Candidate]]:
        return [[Candidate(r.key, r.token_ids, self.context, "")] for r in records]

    def begin(self, *records: ChunkKV) -> list[Any]:
        fetches = self.fetcher.begin(self.wanted(*records))
        assert self.fetcher.wait(lambda: all(f.has_header for f in fetches), 60)
        return fetches

    def let(self, layers: int) -> None:
        self.far.gate.release(layers)


@pytest.fixture
def world(make_record: Make, context: KVContext) -> Iterator[World]:
    made = World(make_record, context)
    yield made
    made.far.gate.release(1000)
    assert made.fetcher.close(60)
    assert made.chain.close(60)
    made.store.check_integrity(expect_idle=True)


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
