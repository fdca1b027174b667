"""The memory store: what may be evicted, who may build, what counts as a hit, and who sees what."""

from __future__ import annotations

import dataclasses
import random
import threading
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from chunk_cache import (
    Build,
    ChunkCacheError,
    ChunkKey,
    ChunkKV,
    ChunkMatcher,
    ChunkState,
    IntegrityError,
    KVContext,
    Lease,
    Match,
    MemoryStore,
)

Make = Callable[..., ChunkKV]
MakeStore = Callable[..., MemoryStore]


def ids_of(number: int, length: int = 8) -> list[int]:
    return list(range(100 * number, 100 * number + length))


def test_a_hit_hands_out_the_record_itself(make_store: MakeStore, make_record: Make):
    store, record = make_store(), make_record(ids_of(1))
    assert store.acquire(record.key, record.token_ids) is None
    assert store.put(record)
    with store.acquire(record.key, ids_of(1)) as lease:  # type: ignore[union-attr]
        assert lease.record is record
        assert store.stats().in_use_now == 1
    stats = store.stats()
    assert (stats.hits_whole, stats.misses_absent, stats.tokens_hit) == (1, 1, 8)
    assert stats.in_use_now == 0


def test_other_tokens_under_the_same_key_are_a_miss(make_store: MakeStore, make_record: Make):
    store, record = make_store(), make_record(ids_of(1))
    store.put(record)
    for ids in ([*ids_of(1)[:-1], 3], [*ids_of(1)[:-1], 0], [*ids_of(1), 0], []):
        assert store.acquire(record.key, ids) is None
    assert store.acquire(record.key, ids_of(1)[2:], chunk_offset=1) is None
    assert store.acquire(record.key, ids_of(1)[-2:], chunk_offset=-2) is None
    assert store.stats().misses_tokens_differ == 6


def test_a_run_deep_in_a_chunk_is_a_hit(make_store: MakeStore, make_record: Make):
    store, record = make_store(), make_record(ids_of(1))
    store.put(record)
    lease = store.acquire(record.key, ids_of(1)[3:6], chunk_offset=3)
    assert lease is not None
    assert (lease.chunk_offset, lease.num_tokens) == (3, 3)
    lease.release()
    assert store.stats().hits_partial == 1


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


def test_an_owner_that_is_gone_gives_up_all_its_builds(make_store: MakeStore, make_record: Make):
    store = make_store()
    for number in range(3):
        record = make_record(ids_of(number))
        store.begin_build(record.key, ids_of(number), owner="a" if number else "b")
    assert store.release_owner("a") == 2
    assert store.release_owner("a") == 0
    assert [info.detail for info in store.ls()] == ["b"]
    assert store.release_owner("b") == 1


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


def test_a_lease_can_be_released_twice_and_counts_once(make_store: MakeStore, make_record: Make):
    store, record = make_store(), make_record(ids_of(1))
    store.put(record)
    one, two = (store.acquire(record.key, ids_of(1)) for _ in range(2))
    assert isinstance(one, Lease)
    assert isinstance(two, Lease)
    one.release()
    one.release()
    assert one.released
    assert store.stats().in_use_now == 1
    two.release()
    assert store.stats().in_use_now == 0


def test_a_stray_writer_is_found_and_its_victim_is_not_served_again(
    make_store: MakeStore, make_record: Make
):
    store = make_store(checksums=True)
    good, bad = make_record(ids_of(1)), make_record(ids_of(2))
    store.put(good)
    store.put(bad)
    lease = store.acquire(bad.key, ids_of(2))
    assert lease is not None
    lease.record.v[0, 0, 0, 0] += 1
    assert store.verify() == [bad.key]
    assert store.acquire(bad.key, ids_of(2)) is None
    assert store.stats().bytes_now == good.num_bytes + bad.num_bytes  # still held by the lease
    store.check_integrity()
    lease.release()
    assert store.stats().bytes_now == good.num_bytes
    assert store.stats().corrupt == 1
    assert store.put(make_record(ids_of(2)))


def test_listing_tells_states_and_use(make_store: MakeStore, make_record: Make, clock: object):
    store = make_store()
    records = [make_record(ids_of(n)) for n in range(3)]
    store.put(records[0], pin=True)
    clock.now += 5.0  # type: ignore[attr-defined]
    store.put(records[1])
    build = store.begin_build(records[2].key, ids_of(2), owner="req-7")
    lines = [info.to_json() for info in store.ls()]
    assert [line["key"] for line in lines] == [
        records[1].key.digest,
        records[0].key.digest,
        records[2].key.digest,
    ]
    assert [line["state"] for line in lines] == ["ready", "ready", "building"]
    assert [line["pinned"] for line in lines] == [False, True, False]
    assert [line["idle_s"] for line in lines] == [0.0, 5.0, 0.0]
    assert lines[2]["detail"] == "req-7"
    assert store.find_keys(records[0].key.digest[:12]) == [records[0].key]
    build.abort(failed=False)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "settings_", [{"byte_budget": 0}, {"build_timeout_s": 0.0}, {"retry_failed_s": -1.0}]
)
def test_settings_that_cannot_work_are_refused(settings_: dict[str, float]):
    with pytest.raises(ChunkCacheError):
        MemoryStore(**{"byte_budget": 10**6, **settings_})  # type: ignore[arg-type]


def test_integrity_notices_a_forgotten_lease_and_wrong_books(make_record: Make):
    store = MemoryStore(10**6)
    record = make_record(ids_of(1))
    store.put(record)
    lease = store.acquire(record.key, ids_of(1))
    store.check_integrity()
    with pytest.raises(IntegrityError, match="still leased"):
        store.check_integrity(expect_idle=True)
    lease.release()  # type: ignore[union-attr]
    store.begin_build(ChunkKey.of(record.key.namespace, [1]), [1])
    with pytest.raises(IntegrityError, match="still building"):
        store.check_integrity(expect_idle=True)
    for damage in ("bytes_now", "pinned_bytes", "evictable", "matcher", "hits"):
        store = MemoryStore(10**6)
        store.put(record)
        store.check_integrity()
        if damage == "evictable":
            store._ledger.evictable.clear()
        elif damage == "matcher":
            store.matcher.remove(record.key)
        elif damage == "hits":
            store._stats.hits += 1
        else:
            setattr(store._ledger, damage, getattr(store._ledger, damage) + 1)
        with pytest.raises(IntegrityError):
            store.check_integrity()


# -- explicit spans and automatic finds ------------------------------------------------------------


def test_tenants_do_not_see_each_other(
    make_store: MakeStore, make_record: Make, context: KVContext
):
    store = make_store()
    other = dataclasses.replace(context, tenant="other")
    mine = make_record(ids_of(1, 90))
    store.put(mine)
    assert store.match(ids_of(1, 90), other) == []
    resolved = store.resolve(ids_of(1, 90), other, spans=[(0, 90)])
    assert resolved == ([], [(0, 90)])
    assert store.put(make_record(ids_of(1, 90), in_context=other))
    assert store.resolve(ids_of(1, 90), other, spans=[(0, 90)]).matches[0].key != mine.key
    assert store.match(ids_of(1, 90), context) == [Match(0, 90, mine.key, 0)]


def test_spans_come_first_and_gaps_are_found_automatically(
    make_store: MakeStore, make_record: Make, context: KVContext
):
    store = make_store(matcher=ChunkMatcher(min_match=8))
    whole, short, cut = (
        make_record(ids_of(1, 40)),
        make_record(ids_of(2, 3)),
        make_record(ids_of(3, 30)),
    )
    for record in (whole, short, cut):
        store.put(record)
    prompt = ids_of(1, 40) + ids_of(2, 3) + [7, 7] + ids_of(3, 30)[10:] + ids_of(4, 12)
    at = len(prompt)
    spans = [(40, 43), (10, 20), (at - 12, at), (5, 5)]
    inside = make_record(ids_of(1, 40)[10:20])
    store.put(inside)
    resolved = store.resolve(prompt, context, spans=spans)
    assert resolved.missing == [(at - 12, at)]
    assert resolved.matches == [
        Match(0, 10, whole.key, 0),
        Match(10, 20, inside.key, 0),
        Match(20, 40, whole.key, 20),
        Match(40, 43, short.key, 0),  # too short to be found, but said
        Match(45, 65, cut.key, 10),
    ]
    assert store.resolve(prompt, context, spans=[(40, 43)], automatic=False).matches == [
        Match(40, 43, short.key, 0)
    ]
    leased = store.acquire_matches(prompt, resolved.matches)
    assert [match for match, _ in leased] == resolved.matches
    for match, lease in leased:
        assert (
            lease.record.token_ids[match.chunk_offset : match.chunk_end].tolist()
            == (prompt[match.prompt_start : match.prompt_end])
        )
        lease.release()


def test_a_match_that_was_evicted_meanwhile_is_left_out(
    make_store: MakeStore, make_record: Make, context: KVContext
):
    store = make_store()
    one, two = make_record(ids_of(1, 90)), make_record(ids_of(2, 90))
    store.put(one)
    store.put(two)
    prompt = ids_of(1, 90) + ids_of(2, 90)
    matches = store.match(prompt, context)
    assert store.evict(one.key)
    leased = store.acquire_matches(prompt, matches)
    assert [match.key for match, _ in leased] == [two.key]
    leased[0][1].release()


@pytest.mark.parametrize("spans", [[(0, 11)], [(-1, 3)], [(5, 4)], [(0, 5), (4, 8)], [(0, 2.0)]])
def test_spans_that_make_no_sense_are_refused(
    make_store: MakeStore, context: KVContext, spans: list[tuple[int, int]]
):
    with pytest.raises(ChunkCacheError, match="span"):
        make_store().resolve(list(range(10)), context, spans=spans)


def test_ids_of_image_pads_are_simply_no_chunk(make_store: MakeStore, context: KVContext):
    prompt = np.array([1, 2**40, 3, 4])
    assert make_store().resolve(prompt, context, spans=[(0, 2), (2, 4)]) == ([], [(2, 4)])


# -- any order of operations -----------------------------------------------------------------------

NAMES = list(range(6))


class StoreMachine(RuleBasedStateMachine):
    """A model of the store (who holds, who builds, what is pinned) against the real one."""

    make: Make

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.records = [self.make(ids_of(n, 4 + 3 * n)) for n in NAMES]
        self.store = MemoryStore(
            3 * self.records[3].num_bytes,
            clock=lambda: self.now,
            build_timeout_s=5,
            retry_failed_s=3,
            matcher=ChunkMatcher(min_match=6),
        )
        self.leases: list[Lease] = []
        self.builds: list[tuple[int, Build]] = []
        self.pinned: set[int] = set()

    @rule(n=st.sampled_from(NAMES))
    def acquire(self, n: int) -> None:
        record = self.records[n]
        ready = self.store.state(record.key) is ChunkState.READY
        lease = self.store.acquire(record.key, record.token_ids)
        assert (lease is not None) == ready
        if lease is not None:
            assert lease.record.key == record.key
            self.leases.append(lease)

    @rule(at=st.integers(0, 10))
    def release(self, at: int) -> None:
        if self.leases:
            self.leases.pop(at % len(self.leases)).release()

    @rule(n=st.sampled_from(NAMES))
    def begin(self, n: int) -> None:
        before = self.store.state(self.records[n].key)
        build = self.store.begin_build(self.records[n].key, self.records[n].token_ids)
        if isinstance(build, Build):
            assert before in (None, ChunkState.FAILED)
            self.builds.append((n, build))
        else:
            assert build is before

    @rule(at=st.integers(0, 10), pin=st.booleans())
    def commit(self, at: int, pin: bool) -> None:
        if self.builds:
            n, build = self.builds.pop(at % len(self.builds))
            if build.commit(self.records[n], pin=pin):
                self.pinned.discard(n)
                if pin:
                    self.pinned.add(n)
                assert self.store.state(self.records[n].key) is ChunkState.READY

    @rule(at=st.integers(0, 10), failed=st.booleans())
    def abort(self, at: int, failed: bool) -> None:
        if self.builds:
            self.builds.pop(at % len(self.builds))[1].abort("no", failed=failed)

    @rule(n=st.sampled_from(NAMES), pinned=st.booleans())
    def pin(self, n: int, pinned: bool) -> None:
        change = self.store.pin if pinned else self.store.unpin
        if change(self.records[n].key):
            (self.pinned.add if pinned else self.pinned.discard)(n)

    @rule(n=st.sampled_from(NAMES), force=st.booleans())
    def evict(self, n: int, force: bool) -> None:
        if self.store.evict(self.records[n].key, force=force):
            assert force or n not in self.pinned
            self.pinned.discard(n)

    @rule(seconds=st.sampled_from([1.0, 5.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def scan(self) -> None:
        prompt = np.concatenate([record.token_ids for record in self.records])
        found = {m.key for m in self.store.match(prompt, self.records[0].key.namespace)}
        assert found == {k for k in sorted(self.store.keys(), key=str) if k.num_tokens >= 6}

    @invariant()
    def whole(self) -> None:
        self.store.check_integrity()
        ready = set(self.store.keys())
        assert {lease.record.key for lease in self.leases} <= ready
        assert {self.records[n].key for n in self.pinned} <= ready

    def teardown(self) -> None:
        for lease in self.leases:
            lease.release()
        for _, build in self.builds:
            build.abort(failed=False)
        self.store.check_integrity(expect_idle=True)


def test_any_order_of_operations_keeps_the_store_whole(make_record: Make):
    class Machine(StoreMachine):
        make = staticmethod(make_record)

    Machine.TestCase.settings = settings(
        max_examples=80,
        stateful_step_count=40,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    Machine.TestCase("runTest").runTest()


def test_many_threads_share_a_store(make_store: MakeStore, make_record: Make):
    records = [make_record(ids_of(n, 20)) for n in range(12)]
    store = make_store(6 * records[0].num_bytes, matcher=ChunkMatcher(min_match=8))
    builders: dict[ChunkKey, int] = {}
    builders_lock = threading.Lock()
    faults: list[str] = []
    start = threading.Barrier(6)

    def work(seed: int) -> None:
        rng = random.Random(seed)
        start.wait()
        try:
            for _ in range(300):
                record = rng.choice(records)
                lease = store.acquire(record.key, record.token_ids)
                if lease is not None:
                    with lease:
                        if lease.record.key != record.key:
                            faults.append("wrong record")
                    continue
                build = store.begin_build(record.key, record.token_ids)
                if isinstance(build, Build):
                    with builders_lock:
                        builders[record.key] = builders.get(record.key, 0) + 1
                        if builders[record.key] > 1:
                            faults.append("two writers")
                    store.match(record.token_ids, record.key.namespace)
                    with builders_lock:
                        builders[record.key] -= 1
                    build.commit(record)
                if rng.random() < 0.1:
                    store.evict(record.key)
        except Exception as error:
            faults.append(repr(error))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    stats = store.stats()
    assert stats.hits + stats.misses == 6 * 300
    assert stats.evicted > 0
