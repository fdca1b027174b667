"""The memory store as it is read: what counts as a hit, who sees what, what it shows of itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest

from chunk_cache import (
    ChunkCacheError,
    ChunkKey,
    ChunkKV,
    ChunkMatcher,
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


def test_a_chunk_that_has_no_key_to_ask_for_is_a_miss_and_counts_can_begin_anew(
    make_store: MakeStore, make_record: Make
):
    store, record = make_store(), make_record(ids_of(1))
    store.put(record)
    store.note_absent(2)
    assert (store.stats().misses, store.stats().misses_absent) == (2, 2)
    store.check_integrity()
    store.forget_counts()
    stats = store.stats()
    assert (stats.misses, stats.inserted, stats.chunks_now) == (0, 0, 1)


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
    build.abort(failed=False)  # type: ignore[union-attr]


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
            store._ledger.policy.hold(record.key)
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
    scans = store.stats().prompts_matched
    assert store.resolve(prompt, context, spans=[(40, 43)]).matches == [Match(40, 43, short.key, 0)]
    assert store.stats().prompts_matched == scans  # none is missing: nothing to look for
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
