"""Records that a thread fetches ahead: a place that is busy is waited for, one that is slow or dead is not."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import pytest

from chunk_cache import ChunkCacheError, ChunkKV
from chunk_cache.tiers.encoding import encode_record, read_header
from chunk_cache.tiers.prefetch import FetchGate, PrefetchedRecord

Make = Callable[..., ChunkKV]


class Place:
    """Records of which each call brings one layer, one call at a time, when the test lets it."""

    def __init__(self) -> None:
        self.gate = FetchGate(1)
        self.turns = threading.Semaphore(0)
        self.calls = 0

    def open(self, record: ChunkKV, wait_s: float) -> PrefetchedRecord:
        encoded = encode_record(record)
        header = read_header(record.key, encoded.header)
        assert header is not None

        def fetch(first: int, last: int) -> Sequence[bytes]:
            self.calls += 1
            assert self.turns.acquire(timeout=60)
            return encoded.layers[first:last]

        return PrefetchedRecord(header, fetch, wait_s=wait_s, gate=self.gate)


def test_a_record_behind_others_is_waited_for_as_long_as_the_place_brings_something(
    make_record: Make,
) -> None:
    place = Place()
    records = [make_record(range(start, start + 8), layers=2) for start in range(0, 320, 8)]
    readers = [place.open(record, 1.0) for record in records]

    def serve() -> None:
        for _ in range(2 * len(records)):
            time.sleep(0.05)
            place.turns.release()

    server = threading.Thread(target=serve)
    server.start()
    # Behind forty others that is two seconds: twice as long as the place may take for it.
    assert readers[-1].layer(0).k.equal(records[-1].layer(0).k)
    for _ in range(2 * len(records)):
        place.turns.release()
    server.join(60)


def test_a_place_that_brings_nothing_is_waited_for_once_whoever_has_the_turn(
    make_record: Make,
) -> None:
    place = Place()
    first, second = (place.open(make_record(range(n, n + 8)), 0.05) for n in (0, 20))
    for reader in (first, second):
        with pytest.raises(TimeoutError, match="did not come in time"):
            reader.layer(0)
    place.turns.release(4)


def test_of_a_record_that_is_not_read_yet_one_layer_is_in_memory_and_none_that_was_read(
    make_record: Make,
) -> None:
    place, record = Place(), make_record(range(8), layers=4)
    place.turns.release(100)
    readers = [place.open(record, 30.0) for _ in range(10)]
    for reader in readers:
        with reader._changed:
            assert reader._changed.wait_for(lambda reader=reader: reader._num_fetched, 60)
        assert list(reader._layers) == [0]
    first, closed = readers[0], readers[1]
    for layer in range(4):
        assert first.layer(layer).v.equal(record.layer(layer).v)
    assert not first._layers
    with pytest.raises(ChunkCacheError, match="read already"):
        first.layer(0)
    assert place.calls == 11
    for reader in readers[1:]:
        reader.close()
    assert list(closed._layers) == [0]
