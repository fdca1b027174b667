"""The matcher on written-out cases: its limits, churn, odd ids, other tenants, a damaged index."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from chunk_cache import ChunkCacheError, ChunkKey, ChunkMatcher, IntegrityError, KVContext, Match
from chunk_cache.matching import fingerprint_index


def random_chunks(count: int, length: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 50_000, length) for _ in range(count)]


def test_churn_compacts_the_index_and_keeps_it_right(
    context: KVContext, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(fingerprint_index, "_MIN_DEAD_TO_COMPACT", 32)
    monkeypatch.setattr(fingerprint_index, "_MAX_PENDING", 64)
    matcher = ChunkMatcher(min_match=16)
    chunks = random_chunks(300, 100)
    kept: list[np.ndarray] = []
    largest = 0
    for number, chunk in enumerate(chunks):
        matcher.add(ChunkKey.of(context, chunk), chunk)
        kept.append(chunk)
        if len(kept) > 20:
            matcher.remove(ChunkKey.of(context, kept.pop(0)))
        if number % 7 == 0:
            found = matcher.match(np.concatenate(kept[::-1]), context).matches
            assert [m.key for m in found] == [ChunkKey.of(context, c) for c in kept[::-1]]
        largest = max(largest, matcher._index.num_bytes)
    matcher.check_integrity()
    alone = ChunkMatcher(min_match=16)
    for chunk in kept:
        alone.add(ChunkKey.of(context, chunk), chunk)
    assert (
        largest < 4 * alone._index.num_bytes
    )  # 280 of 300 are gone; their fingerprints must be too


def test_a_chunk_evicted_and_rebuilt_a_thousand_times_stays_easy_to_find(context: KVContext):
    matcher = ChunkMatcher(max_postings=4)
    chunk = random_chunks(1, 400)[0]
    key = ChunkKey.of(context, chunk)
    for _ in range(1000):
        matcher.add(key, chunk)
        assert matcher.remove(key)
    matcher.add(key, chunk)
    result = matcher.match(chunk, context)
    assert not result.truncated
    assert result.matches == [Match(0, 400, key, 0)]


def test_one_token_repeated_is_covered_within_the_limits(context: KVContext):
    matcher = ChunkMatcher()
    chunk = np.full(400, 7)
    matcher.add(ChunkKey.of(context, chunk), chunk)
    result = matcher.match(np.full(4000, 7), context)
    assert result.truncated
    covered = [p for match in result.matches for p in range(match.prompt_start, match.prompt_end)]
    assert covered == list(range(4000))


def test_boiler_plate_in_very_many_chunks_does_not_hide_the_right_ones(context: KVContext):
    header = random_chunks(1, 80, seed=1)[0]
    chunks = [np.concatenate([header, body]) for body in random_chunks(2000, 150)]
    matcher = ChunkMatcher()
    for chunk in chunks:
        matcher.add(ChunkKey.of(context, chunk), chunk)
    prompt = np.concatenate([chunks[1700], chunks[3], header, [1, 2, 3]])
    result = matcher.match(prompt, context)
    whole = [ChunkKey.of(context, chunks[1700]), ChunkKey.of(context, chunks[3])]
    assert [m.key for m in result.matches[:2]] == whole
    assert [m[:2] for m in result.matches[:2]] == [(0, 230), (230, 460)]
    assert result.matches[2][:2] == (460, 540)


def test_among_many_near_copies_the_one_that_fits_is_preferred(context: KVContext):
    # 40 openings and 40 endings, each pair a chunk: every fingerprint is frequent.
    openings, endings = random_chunks(40, 100, seed=2), random_chunks(40, 100, seed=3)
    matcher = ChunkMatcher(max_postings=8)
    for opening in openings:
        for ending in endings:
            chunk = np.concatenate([opening, ending])
            matcher.add(ChunkKey.of(context, chunk), chunk)
    prompt = np.concatenate([openings[31], endings[17]])
    result = matcher.match(prompt, context)
    assert result.truncated
    assert result.matches == [Match(0, 200, ChunkKey.of(context, prompt), 0)]


@pytest.mark.parametrize("offset", [0, 1, 31, 32, 63, 64, 200])
@pytest.mark.parametrize("start", [0, 1, 100, 336])
def test_a_run_of_exactly_the_stated_length_is_found_at_any_offset(
    context: KVContext, offset: int, start: int
):
    chunk = random_chunks(1, 400)[0]
    noise = random_chunks(1, 500, seed=9)[0]
    key = ChunkKey.of(context, chunk)
    matcher = ChunkMatcher()
    matcher.add(key, chunk)
    piece = chunk[start : start + 64]
    prompt = np.concatenate([noise[:offset], piece, noise[offset:]])
    assert matcher.match(prompt, context).matches == [Match(offset, offset + 64, key, start)]
    shorter = np.concatenate([noise[:offset], piece[:63], noise[offset:]])
    assert matcher.match(shorter, context).matches == []


def test_another_tenant_finds_nothing(context: KVContext):
    chunk = random_chunks(1, 200)[0]
    matcher = ChunkMatcher()
    matcher.add(ChunkKey.of(context, chunk), chunk)
    assert matcher.match(chunk, dataclasses.replace(context, tenant="other")).runs == []
    assert len(matcher.match(chunk, context).runs) == 1


def test_ids_outside_any_vocabulary_match_nothing(context: KVContext):
    chunk = random_chunks(1, 200)[0]
    matcher = ChunkMatcher()
    matcher.add(ChunkKey.of(context, chunk), chunk)
    prompt = np.concatenate([np.full(100, 2**40), chunk, np.full(100, -1)])
    assert [m[:2] for m in matcher.match(prompt, context).matches] == [(100, 300)]
    # 2**32 more must not be taken for the same token by a conversion to 32 bits.
    assert matcher.match(chunk + 2**32, context).matches == []


def test_damage_to_the_index_is_noticed(context: KVContext):
    chunk = random_chunks(1, 200)[0]
    key = ChunkKey.of(context, chunk)
    for damage in ("lost", "foreign", "unsorted"):
        matcher = ChunkMatcher()
        matcher.add(key, chunk)
        matcher.match(chunk, context)
        matcher.check_integrity()
        run = matcher._index._runs[0]
        if damage == "lost":
            matcher._index._runs = []
        elif damage == "foreign":
            run.postings[0] += 1
        else:
            run.hashes[[0, 1]] = run.hashes[[1, 0]]
            run.postings[[0, 1]] = run.postings[[1, 0]]
        with pytest.raises(IntegrityError):
            matcher.check_integrity()


def test_settings_that_cannot_work_are_refused():
    for name in ("min_match", "max_postings", "max_alignments", "min_piece"):
        with pytest.raises(ChunkCacheError, match=name):
            ChunkMatcher(**{name: 0})
