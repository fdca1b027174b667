"""Several tiers as one: where a look-up ends, where a record goes, what is lost when a tier cannot keep up or fails."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from chunk_cache import ChunkCacheError, ChunkKey, ChunkKV, KVContext, Tier, TierChain

Make = Callable[..., ChunkKV]


class Shelf(Tier):
    """A dict that can be told to fail, or to hang in a write."""

    def __init__(self) -> None:
        self.records: dict[ChunkKey, ChunkKV] = {}
        self.is_broken = False
        self.may_write = threading.Event()
        self.may_write.set()
        self.writes = threading.Event()

    @classmethod
    def connect(cls, location: str, *, byte_budget: int, model: str) -> Shelf:
        return cls()

    def _work(self) -> None:
        if self.is_broken:
            raise RuntimeError("no shelf")

    def contains(self, key: ChunkKey) -> bool:
        self._work()
        return key in self.records

    def read(self, key: ChunkKey) -> ChunkKV | None:
        self._work()
        return self.records.get(key)

    def put(self, record: ChunkKV, *, context: Any = None, tenant: Any = None) -> bool:
        self._work()
        self.writes.set()
        assert self.may_write.wait(60)
        self.records[record.key] = record
        return True

    def remove(self, key: ChunkKey) -> bool:
        self._work()
        return self.records.pop(key, None) is not None

    def keys(self) -> Iterator[ChunkKey]:
        return iter(list(self.records))


class Shelves:
    """A chain of two shelves, and what it counted."""

    def __init__(self, **options: Any) -> None:
        self.near, self.far = Shelf(), Shelf()
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


def test_a_chain_has_no_place_of_its_own() -> None:
    with pytest.raises(ChunkCacheError, match="connect its tiers"):
        TierChain.connect("somewhere", byte_budget=1, model="")
