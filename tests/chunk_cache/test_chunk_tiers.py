"""What the cache does with a tier of somebody else's that breaks its contract."""

from __future__ import annotations

import time
from collections.abc import Callable

from shelf import Shelf

from chunk_cache import (
    BackgroundWriter,
    ChunkKV,
    KVContext,
    MemoryStore,
    load_store,
)
from chunk_cache.tiers import background_writer

Make = Callable[..., ChunkKV]


def test_a_record_of_another_key_is_damage(make_record: Make) -> None:
    tier, store = Shelf(), MemoryStore(1 << 20)
    one, other = make_record(range(8)), make_record(range(50, 58))
    tier.records = {one.key: other, other.key: other}
    assert tier.get(one.key, other.token_ids) is None
    assert tier.open(one.key, other.token_ids) is None
    report = load_store(tier, store)
    assert (report.loaded, report.corrupt) == (1, 1)
    assert store.keys() == [other.key]


def test_a_tier_that_cannot_note_use_goes_on_being_written(
    make_record: Make, context: KVContext, monkeypatch
) -> None:
    class Noting(Shelf):
        def used(self, keys) -> None:
            list(keys)
            raise RuntimeError("no notes")

    monkeypatch.setattr(background_writer, "_NOTE_USE_S", 0.02)
    tier, failed = Noting(), []
    writer = BackgroundWriter(tier, count=lambda kind: None, failed=failed.append)
    try:
        deadline = time.monotonic() + 10
        while not failed:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        record = make_record(range(8))
        assert writer.put(record, context, "")
        assert writer.drain(10)
    finally:
        writer.close(5)
    assert tier.contains(record.key)
    assert "no notes" in str(failed[0])
