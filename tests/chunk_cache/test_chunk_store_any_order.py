"""The memory store under any order of operations, and under many threads at once."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from chunk_cache import Build, ChunkKey, ChunkKV, ChunkMatcher, ChunkState, Lease, MemoryStore

Make = Callable[..., ChunkKV]
MakeStore = Callable[..., MemoryStore]
NAMES = list(range(6))


class StoreMachine(RuleBasedStateMachine):
    """A model of the store (who holds, who builds, what is pinned) against the real one."""

    make: Make
    slab = False

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.records = [self.make(range(100 * n, 100 * n + 4 + 3 * n)) for n in NAMES]
        self.store = MemoryStore(
            3 * self.records[3].num_bytes,
            clock=lambda: self.now,
            build_timeout_s=5,
            retry_failed_s=3,
            matcher=ChunkMatcher(min_match=6),
            slab=self.slab,
        )
        self.sums = {record.key: record.compute_checksum() for record in self.records}
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
        for lease in self.leases:
            assert lease.record.compute_checksum() == self.sums[lease.record.key]
        assert {self.records[n].key for n in self.pinned} <= ready

    def teardown(self) -> None:
        for lease in self.leases:
            lease.release()
        for _, build in self.builds:
            build.abort(failed=False)
        self.store.check_integrity(expect_idle=True)


@pytest.mark.parametrize("with_slab", [False, True])
def test_any_order_of_operations_keeps_the_store_whole(make_record: Make, with_slab: bool):
    class Machine(StoreMachine):
        make = staticmethod(make_record)
        slab = with_slab

    Machine.TestCase.settings = settings(
        max_examples=80,
        stateful_step_count=40,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    Machine.TestCase("runTest").runTest()


@pytest.mark.parametrize("slab", [False, True])
def test_many_threads_share_a_store(make_store: MakeStore, make_record: Make, slab: bool):
    records = [make_record(range(100 * n, 100 * n + 20)).sealed() for n in range(12)]
    store = make_store(6 * records[0].num_bytes, matcher=ChunkMatcher(min_match=8), slab=slab)
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
                        if not lease.record.verify():
                            faults.append("wrong bytes")
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
