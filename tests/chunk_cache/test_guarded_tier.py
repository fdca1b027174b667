"""Any tier behind a circuit breaker: one that hangs, one that raises, one that works."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from chunk_cache import ChunkKey, ChunkKV, KVContext, StoreFolder
from chunk_cache.tiers.base import Tier
from chunk_cache.tiers.breaker import CircuitBreaker
from chunk_cache.tiers.guard import GuardedTier
from chunk_cache.tiers.guarded_calls import TierDownError

Make = Callable[..., ChunkKV]


class Spoilt(Tier):
    """Raises or hangs as a test says, and counts who asks."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.hang: threading.Event | None = None
        self.asked = 0

    def _answer(self) -> None:
        self.asked += 1
        if self.hang is not None:
            self.hang.wait(20)
        if self.error is not None:
            raise self.error

    @classmethod
    def connect(cls, location: str, *, byte_budget: int, model: str) -> Spoilt:
        return cls()

    def contains(self, key: ChunkKey) -> bool:
        self._answer()
        return True

    def read(self, key: ChunkKey) -> ChunkKV | None:
        self._answer()
        return None

    def put(
        self, record: ChunkKV, *, context: KVContext | None = None, tenant: str | None = None
    ) -> bool:
        self._answer()
        return True

    def remove(self, key: ChunkKey) -> bool:
        self._answer()
        return True

    def keys(self) -> Iterator[ChunkKey]:
        self._answer()
        return iter(())


@pytest.fixture
def spoilt() -> Spoilt:
    return Spoilt()


@pytest.fixture
def guarded(spoilt: Spoilt, clock: Any) -> GuardedTier:
    return GuardedTier(spoilt, name="shelf", breaker=CircuitBreaker(clock=clock), wait_s=0.05)


@pytest.mark.parametrize("error", [OSError("gone"), RuntimeError("a fault of its own")])
def test_a_tier_that_raises_is_asked_once_and_is_a_miss(
    error: Exception, spoilt: Spoilt, guarded: GuardedTier, make_record: Make
) -> None:
    record = make_record(range(8))
    spoilt.error = error
    for _ in range(3):
        assert not guarded.contains(record.key)
        assert guarded.open(record.key, record.token_ids) is None
        assert guarded.get(record.key, record.token_ids) is None
        assert guarded.token_ids(record.key) is None
        assert guarded.size_of(record.key) == 0
        guarded.used([record.key])
    assert spoilt.asked == 1
    assert guarded.counts["failures"] == 1
    assert guarded.counts["skipped"] == 17


def test_a_tier_that_hangs_is_waited_for_once(
    spoilt: Spoilt, guarded: GuardedTier, clock: Any, make_record: Make
) -> None:
    record = make_record(range(8))
    spoilt.hang = threading.Event()
    try:
        assert not guarded.contains(record.key)
        assert guarded.open(record.key, record.token_ids) is None
        assert spoilt.asked == 1
        assert guarded.counts["timeouts"] == 1
    finally:
        spoilt.hang.set()
    spoilt.hang = None
    clock.now += 1.0
    assert guarded.contains(record.key), "it is tried again"
    assert guarded.stats()["state"] == "closed"
    assert guarded.counts["closed"] == 1


@pytest.mark.parametrize("jump_s", [-24 * 3600, 24 * 3600])
def test_a_wall_clock_that_jumps_neither_closes_nor_holds_the_breaker(
    jump_s: int, spoilt: Spoilt, make_record: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    guarded = GuardedTier(
        spoilt, name="shelf", breaker=CircuitBreaker(first_wait_s=30.0), wait_s=0.05
    )
    record, real, monotonic = make_record(range(8)), time.time, time.monotonic
    spoilt.error = OSError("gone")
    assert not guarded.contains(record.key)
    spoilt.error = None
    monkeypatch.setattr(time, "time", lambda: real() + jump_s)
    assert not guarded.contains(record.key), "a day has not passed"
    guarded.breaker._clock = lambda: monotonic() + 31
    assert guarded.contains(record.key)


def test_who_writes_or_erases_hears_that_it_is_down(
    spoilt: Spoilt, guarded: GuardedTier, make_record: Make
) -> None:
    record = make_record(range(8))
    spoilt.error = OSError("gone")
    with pytest.raises(OSError, match="gone"):
        guarded.put(record)
    for call in (
        lambda: guarded.put(record),
        lambda: guarded.remove(record.key),
        lambda: list(guarded.keys()),
        lambda: guarded.describe("0" * 32),
        guarded.sync,
    ):
        with pytest.raises(TierDownError, match="shelf did not answer lately; it is tried again"):
            call()
    assert spoilt.asked == 1


def test_a_folder_behind_a_guard_is_the_same_folder(
    make_record: Make, context: KVContext, tmp_path: Any
) -> None:
    guarded = GuardedTier(StoreFolder(tmp_path / "kv", create=True), name="folder")
    record = make_record(range(8))
    assert guarded.put(record, context=context, tenant="somebody")
    reader = guarded.open(record.key, record.token_ids)
    assert reader is not None
    assert reader.layout == record.layout
    for index in range(2):
        layer, wanted = reader.layer(index, 2, 7), record.layer(index, 2, 7)
        assert layer.k.equal(wanted.k)
        assert layer.v.equal(wanted.v)
    assert guarded.counts["layers"] == 2
    assert guarded.counts["bytes"] == 2 * (wanted.k.nbytes + wanted.v.nbytes)
    assert list(guarded.keys()) == guarded.keys_by_use() == [record.key]
    assert guarded.tenant_of(context.namespace) == "somebody"
    assert guarded.namespaces({"dtype": "bfloat16"}) == {context.namespace}
    assert guarded.remove(record.key)
    assert guarded.open(record.key, record.token_ids) is None
