"""Several tiers as one: where a look-up ends, where a record goes, what is lost when a tier cannot keep up or fails."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from shelf import Shelf

from chunk_cache import ChunkCacheError, ChunkKey, ChunkKV, KVContext, MemoryStore, TierChain

Make = Callable[..., ChunkKV]


class UnreliableShelf(Shelf):
    """A shelf that can be told to fail, or to hang in a write."""

    def __init__(self) -> None:
        super().__init__()
        self.is_broken = False
        self.answers_late = False
        self.removals: list[ChunkKey] = []
        self.refusals = 0
        self.may_write = threading.Event()
        self.may_write.set()
        self.writes = threading.Event()

    def _work(self) -> None:
        if self.is_broken:
            raise RuntimeError("no shelf")

    def contains(self, key: ChunkKey) -> bool:
        self._work()
        return super().contains(key)

    def read(self, key: ChunkKey) -> ChunkKV | None:
        self._work()
        return super().read(key)

    def put(self, record: ChunkKV, *, context: Any = None, tenant: Any = None) -> bool:
        self._work()
        self.writes.set()
        assert self.may_write.wait(60)
        stored = super().put(record)
        if self.answers_late:
            raise TimeoutError("no answer")
        return stored

    def remove(self, key: ChunkKey) -> bool:
        self._work()
        self.removals.append(key)
        if self.refusals:
            self.refusals -= 1
            raise OSError("not now")
        return super().remove(key)


class Shelves:
    """A chain of two shelves, and what it counted."""

    def __init__(self, **options: Any) -> None:
        self.near, self.far = UnreliableShelf(), UnreliableShelf()
        self.counts: Counter[tuple[str, str]] = Counter()
        self.failed: list[str] = []
        self.erased: set[ChunkKey] = set()
        self.chain = TierChain(
            {"near": self.near, "far": self.far},
            count=lambda tier, kind: self.counts.update([(tier, kind)]),
            failed=lambda tier, error: self.failed.append(tier),
            is_erased=lambda record, tenant: record.key in self.erased,
            **options,
        )


@pytest.fixture
def shelves() -> Iterator[Shelves]:
    made = Shelves()
    yield made
    for shelf in (made.near, made.far):
        shelf.may_write.set()
    assert made.chain.close(60)


def test_a_look_up_ends_in_the_nearest_tier_that_has_the_record(
    shelves: Shelves, make_record: Make
) -> None:
    one, both = make_record(range(8)), make_record(range(20, 28))
    shelves.far.records = {one.key: one, both.key: both}
    shelves.near.records = {both.key: both}
    for record, tier in ((one, "far"), (both, "near")):
        found = shelves.chain.find(record.key, record.token_ids)
        assert found is not None
        assert (found.tier, found.reader) == (tier, record)
        assert shelves.chain.contains(record.key)
        assert shelves.chain.get(record.key, record.token_ids) is record
    assert shelves.chain.open(one.key, both.token_ids) is None
    assert set(shelves.chain.keys()) == {one.key, both.key}
    assert shelves.counts["near", "hit"] == 1
    assert shelves.counts["near", "miss"] == 2
    assert shelves.counts["far", "miss"] == 1


def test_what_does_not_verify_in_one_tier_is_taken_from_the_next(
    shelves: Shelves, make_record: Make
) -> None:
    one, other = make_record(range(8)), make_record(range(20, 28))
    shelves.near.records = {one.key: other}
    shelves.far.records = {one.key: one}
    assert shelves.chain.open(one.key, one.token_ids) is one
    assert shelves.chain.read(one.key) is one


def test_a_tier_that_raises_is_passed_over_and_counted(shelves: Shelves, make_record: Make) -> None:
    record = make_record(range(8))
    shelves.far.records = {record.key: record}
    shelves.near.is_broken = True
    found = shelves.chain.find(record.key, record.token_ids)
    assert found is not None
    assert found.tier == "far"
    assert shelves.chain.contains(record.key)
    assert shelves.counts["near", "read_failed"] == 2
    shelves.far.is_broken = True
    assert shelves.chain.open(record.key, record.token_ids) is None
    assert not shelves.chain.contains(record.key)


def test_a_record_is_written_to_all_tiers_whatever_one_of_them_does(
    shelves: Shelves, make_record: Make, context: KVContext
) -> None:
    record = make_record(range(8))
    shelves.near.is_broken = True
    assert shelves.chain.put(record, context=context)
    assert shelves.chain.drain(60)
    assert shelves.far.records == {record.key: record}
    assert shelves.counts == {("near", "write_failed"): 1, ("far", "written"): 1}
    assert shelves.failed == ["near"]
    with pytest.raises(ChunkCacheError, match="needs the context"):
        shelves.chain.put(record)


def test_what_was_found_is_written_to_the_tiers_above_only(
    shelves: Shelves, make_record: Make, context: KVContext
) -> None:
    one, other = make_record(range(8)), make_record(range(20, 28))
    shelves.chain.write_back(one, context, "", found_in="far")
    shelves.chain.write_back(other, context, "", found_in="near")
    assert shelves.chain.drain(60)
    assert set(shelves.near.records) == {one.key}
    assert not shelves.far.records


def test_a_slow_tier_drops_what_its_queue_does_not_hold_and_holds_no_other_up(
    make_record: Make, context: KVContext
) -> None:
    records = [make_record(range(start, start + 8)) for start in range(0, 80, 8)]
    shelves = Shelves(queue_bytes=3 * records[0].num_bytes)
    shelves.far.may_write.clear()
    for record in records:
        shelves.chain.put(record, context=context)
        assert shelves.near.writes.wait(60)
        shelves.near.writes.clear()
    assert shelves.far.writes.wait(60)
    assert shelves.chain.queues()["far"] == (3, 3 * records[0].num_bytes)
    shelves.far.may_write.set()
    assert shelves.chain.close(60)
    assert len(shelves.near.records) == 10
    assert len(shelves.far.records) == 3
    assert shelves.counts["far", "dropped"] == 7


def test_what_is_removed_is_gone_everywhere_also_what_is_on_its_way(
    shelves: Shelves, make_record: Make, context: KVContext
) -> None:
    one, other = make_record(range(8)), make_record(range(20, 28))
    shelves.far.may_write.clear()
    for record in (one, other):
        shelves.chain.put(record, context=context)
    assert shelves.far.writes.wait(60)  # in the middle of the first
    assert shelves.chain.remove(one.key) | (not shelves.near.records)
    assert not shelves.chain.remove(one.key)
    shelves.far.may_write.set()
    assert shelves.chain.drain(60)
    assert set(shelves.far.records) == {other.key}
    assert one.key not in shelves.near.records


def test_a_tier_that_refuses_to_remove_is_told_of_when_the_others_have_removed(
    shelves: Shelves, make_record: Make
) -> None:
    record = make_record(range(8))
    shelves.far.records = {record.key: record}
    shelves.near.is_broken = True
    with pytest.raises(RuntimeError, match="no shelf"):
        shelves.chain.remove(record.key)
    assert not shelves.far.records


def test_what_is_erased_while_it_waits_reaches_no_tier(
    shelves: Shelves, make_record: Make, context: KVContext
) -> None:
    records = [make_record(range(start, start + 8)) for start in range(0, 24, 8)]
    shelves.far.may_write.clear()
    for record in records:
        shelves.chain.put(record, context=context)
    assert shelves.far.writes.wait(60)
    shelves.erased = {records[0].key, records[1].key}
    shelves.chain.erase()
    shelves.far.may_write.set()
    assert shelves.chain.drain(60)
    assert set(shelves.far.records) == {records[2].key}


def test_what_is_erased_while_it_is_written_goes_though_the_tier_did_not_answer(
    shelves: Shelves, make_record: Make, context: KVContext
) -> None:
    record = make_record(range(8))
    shelves.far.may_write.clear()
    shelves.far.answers_late = True
    shelves.chain.put(record, context=context)
    assert shelves.far.writes.wait(60)
    shelves.erased = {record.key}
    shelves.chain.erase()
    shelves.far.may_write.set()
    assert shelves.chain.drain(60)
    assert not shelves.far.records
    assert shelves.counts["far", "erased"] == 1


def test_what_a_tier_refuses_to_remove_after_it_was_written_is_removed_when_it_can_be(
    shelves: Shelves, make_record: Make, context: KVContext
) -> None:
    record, other = make_record(range(8)), make_record(range(20, 28))
    shelves.far.may_write.clear()
    shelves.chain.put(record, context=context)
    assert shelves.far.writes.wait(60)
    shelves.far.refusals = 1
    shelves.erased = {record.key}
    shelves.chain.erase()
    shelves.erased = set()  # the notice is out of force when the tier answers again
    shelves.far.may_write.set()
    assert shelves.chain.drain(60)
    shelves.chain.put(other, context=context)
    assert shelves.chain.drain(60)
    assert set(shelves.far.records) == {other.key}
    assert shelves.far.removals == [record.key] * 2
    assert shelves.failed == ["far"]


def test_a_queue_that_was_cleared_while_a_record_is_written_holds_no_more_than_its_bytes(
    make_record: Make, context: KVContext
) -> None:
    records = [make_record(range(start, start + 8)) for start in range(0, 32, 8)]
    shelves = Shelves(queue_bytes=2 * records[0].num_bytes)
    shelves.far.may_write.clear()
    shelves.chain.put(records[0], context=context)
    assert shelves.far.writes.wait(60)
    shelves.chain.clear()
    assert shelves.chain.queues()["far"] == (1, records[0].num_bytes)
    for record in records[1:]:
        shelves.chain.put(record, context=context)
    assert shelves.chain.queues()["far"] == (2, 2 * records[0].num_bytes)
    shelves.far.may_write.set()
    assert shelves.chain.close(60)
    assert set(shelves.far.records) == {records[0].key, records[1].key}


def test_who_hears_of_a_write_finds_an_empty_queue_and_may_fail(
    make_record: Make, context: KVContext
) -> None:
    seen = []

    def wrote(name: str, num_bytes: int, seconds: float) -> None:
        seen.append((name, num_bytes, shelves.chain.queues()[name]))
        raise RuntimeError("no counter")

    shelves = Shelves(wrote=wrote)
    one, other = make_record(range(8)), make_record(range(20, 28))
    for record in (one, other):
        shelves.chain.put(record, context=context)
        assert shelves.chain.drain(60)
    assert shelves.chain.close(60)
    assert sorted(seen) == sorted((n, one.num_bytes, (0, 0)) for n in ("near", "far") for _ in "12")
    assert set(shelves.near.records) == {one.key, other.key}


def test_a_chain_has_no_place_of_its_own() -> None:
    with pytest.raises(ChunkCacheError, match="connect its tiers"):
        TierChain.connect("somewhere", byte_budget=1, model="")


def test_tiers_are_asked_in_the_order_of_their_cost(make_record: Make, context: KVContext) -> None:
    made = Shelves(order=lambda names: names[::-1])
    record = make_record(range(8))
    made.near.records[record.key] = made.far.records[record.key] = record
    found = made.chain.find(record.key, record.token_ids)
    assert found is not None
    assert found.tier == "far"
    assert made.counts == {("far", "hit"): 1}
    made.chain.write_back(record, context, "", found_in="far")
    assert made.chain.pending == 0  # the near one has it
    assert made.chain.close(60)


def test_what_memory_drops_before_it_was_written_is_written(
    shelves: Shelves, make_record: Make, context: KVContext
) -> None:
    records = [make_record(range(100 * n, 100 * n + 8)) for n in range(4)]
    store = MemoryStore(2 * records[0].num_bytes)
    shelves.near.may_write.clear()
    for record in records:
        assert store.put(record)
        assert shelves.chain.put(record, context=context)
    assert store.stats().evicted == 2
    shelves.near.may_write.set()
    assert shelves.chain.drain(60)
    assert {record.key for record in records} == set(shelves.near.records)
