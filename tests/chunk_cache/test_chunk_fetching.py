"""Records that are read from a lower tier while they are used: order, waiting, damage, budget, erasure."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from chunk_cache import (
    Build,
    Candidate,
    ChunkKey,
    ChunkKV,
    ChunkState,
    DamagedRecordError,
    Fetcher,
    KVContext,
    LayerKV,
    LoadError,
    MemoryStore,
    RecordForm,
    Tier,
    TierChain,
    Timeline,
    layer_wise_seconds,
)

Make = Callable[..., ChunkKV]
LAYERS = 4


class GatedReader:
    """A record of which a layer is read when the test lets it."""

    def __init__(self, tier: GatedTier, record: ChunkKV) -> None:
        self.tier, self.record = tier, record
        self.token_ids, self.base_position = record.token_ids, record.base_position
        self.layout, self.num_layers = record.layout, record.num_layers
        self.num_tokens = record.num_tokens

    def layer(self, index: int, start: int = 0, end: int | None = None) -> LayerKV:
        self.tier.asked.append((self.record.key, index))
        assert self.tier.gate.acquire(timeout=60)
        if self.tier.fault is not None and index == self.tier.fault_at:
            raise self.tier.fault
        return self.record.layer(index, start, end)


class GatedTier(Tier):
    """A dict whose records are read layer by layer."""

    def __init__(self) -> None:
        self.records: dict[ChunkKey, ChunkKV] = {}
        self.gate = threading.Semaphore(0)
        self.asked: list[tuple[ChunkKey, int]] = []
        self.fault: Exception | None = None
        self.fault_at = 1

    @classmethod
    def connect(cls, location: str, *, byte_budget: int, model: str) -> GatedTier:
        return cls()

    def open(self, key: ChunkKey, token_ids: Any) -> GatedReader | None:
        record = self.get(key, token_ids)
        return None if record is None else GatedReader(self, record)

    def contains(self, key: ChunkKey) -> bool:
        return key in self.records

    def read(self, key: ChunkKey) -> ChunkKV | None:
        return self.records.get(key)

    def put(self, record: ChunkKV, *, context: Any = None, tenant: Any = None) -> bool:
        self.records[record.key] = record
        return True

    def remove(self, key: ChunkKey) -> bool:
        return self.records.pop(key, None) is not None

    def keys(self) -> Iterator[ChunkKey]:
        return iter(list(self.records))


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
