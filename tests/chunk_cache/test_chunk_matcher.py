"""The matcher against a brute-force one, on alphabets small enough for everything to collide."""

from __future__ import annotations

import dataclasses
from itertools import combinations

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    rule,
)

from chunk_cache import (
    ChunkCacheError,
    ChunkKey,
    ChunkMatcher,
    IntegrityError,
    KVContext,
    Match,
    merge_matches,
)
from chunk_cache.matching import fingerprint_index, longest_cover
from chunk_cache.matching.hashing import WindowHasher, winnow

CONTEXT = KVContext(model_fingerprint="m", dtype="f", kv_dtype="f", rope="r", prefix_digest="p")
OTHER = dataclasses.replace(CONTEXT, tenant="other")
NO_LIMIT = 10**6


def brute_force_runs(chunks: list[list[int]], prompt: list[int], min_match: int) -> set[Match]:
    """Every maximal common run, by comparing every chunk at every shift, token by token."""
    runs: set[Match] = set()
    for chunk in chunks:
        key = ChunkKey.of(CONTEXT, chunk)
        for shift in range(1 - len(chunk), len(prompt)):
            start = None
            for position in range(max(0, shift), min(len(prompt), shift + len(chunk)) + 1):
                inside = position < min(len(prompt), shift + len(chunk))
                if inside and prompt[position] == chunk[position - shift]:
                    start = position if start is None else start
                elif start is not None:
                    if position - start >= min_match:
                        runs.add(Match(start, position, key, start - shift))
                    start = None
    return runs


def union(matches: list[Match] | set[Match]) -> set[int]:
    return {p for match in matches for p in range(match.prompt_start, match.prompt_end)}


def fewest_pieces(runs: set[Match]) -> int:
    """Smallest number of runs with the same union, by trying all subsets (small inputs only)."""
    goal = union(runs)
    for count in range(len(runs) + 1):
        if any(union(set(some)) == goal for some in combinations(runs, count)):
            return count
    raise AssertionError


def assert_valid(
    matches: list[Match], prompt: list[int], chunks: dict[ChunkKey, list[int]]
) -> None:
    before = 0
    for match in matches:
        assert match.prompt_start >= before
        assert match.prompt_end > match.prompt_start
        before = match.prompt_end
        chunk = chunks[match.key]
        assert 0 <= match.chunk_offset < match.chunk_end <= len(chunk)
        run = prompt[match.prompt_start : match.prompt_end]
        assert chunk[match.chunk_offset : match.chunk_end] == run


tokens = st.integers(0, 2)
texts = st.lists(tokens, min_size=1, max_size=40)


@st.composite
def chunks_and_prompt(draw: st.DrawFn) -> tuple[list[list[int]], list[int]]:
    """Chunks and a prompt made of pieces of them, with few tokens and much repetition."""
    alphabet = st.integers(0, draw(st.sampled_from([0, 1, 3, 50])))
    chunk_list = draw(st.lists(st.lists(alphabet, min_size=1, max_size=40), max_size=6))
    prompt: list[int] = []
    for _ in range(draw(st.integers(0, 6))):
        if chunk_list and draw(st.booleans()):
            chunk = draw(st.sampled_from(chunk_list))
            start = draw(st.integers(0, len(chunk) - 1))
            prompt += chunk[start : draw(st.integers(start, len(chunk)))]
        else:
            prompt += draw(st.lists(alphabet, max_size=8))
    return chunk_list, prompt


@settings(max_examples=400, deadline=None)
@given(chunks_and_prompt(), st.integers(1, 12))
def test_all_maximal_runs_are_found_and_nothing_else(
    case: tuple[list[list[int]], list[int]], min_match: int
):
    chunks, prompt = case
    matcher = ChunkMatcher(min_match=min_match, max_postings=NO_LIMIT, max_alignments=NO_LIMIT)
    for chunk in chunks:
        matcher.add(ChunkKey.of(CONTEXT, chunk), chunk)
    result = matcher.match(prompt, CONTEXT)
    expected = brute_force_runs(chunks, prompt, min_match)
    assert not result.truncated
    assert len(result.runs) == len(set(result.runs))
    assert set(result.runs) == expected
    assert_valid(result.matches, prompt, {ChunkKey.of(CONTEXT, c): c for c in chunks})
    assert union(result.matches) == union(expected)
    matcher.check_integrity()


@settings(max_examples=150, deadline=None)
@given(chunks_and_prompt(), st.integers(1, 8), st.integers(1, 4), st.integers(1, 6))
def test_past_the_limits_what_is_reported_is_still_true(
    case: tuple[list[list[int]], list[int]], min_match: int, max_postings: int, max_alignments: int
):
    chunks, prompt = case
    matcher = ChunkMatcher(
        min_match=min_match, max_postings=max_postings, max_alignments=max_alignments
    )
    for chunk in chunks:
        matcher.add(ChunkKey.of(CONTEXT, chunk), chunk)
    result = matcher.match(prompt, CONTEXT)
    expected = brute_force_runs(chunks, prompt, min_match)
    assert set(result.runs) <= expected
    assert_valid(result.matches, prompt, {ChunkKey.of(CONTEXT, c): c for c in chunks})
    if not result.truncated:
        assert set(result.runs) == expected


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(1, 12)), max_size=7),
    st.integers(1, 6),
)
def test_the_cover_is_the_longest_with_the_fewest_pieces(
    intervals: list[tuple[int, int]], min_piece: int
):
    text = list(range(50))
    runs = {
        Match(start, start + n, ChunkKey.of(CONTEXT, text[start : start + n]))
        for start, n in intervals
    }
    cover = longest_cover(list(runs), min_piece=min_piece)
    assert union(cover) == union(runs)
    assert sum(match.num_tokens for match in cover) == len(union(runs))
    assert len(cover) == fewest_pieces(runs)
    assert cover == longest_cover(sorted(runs, reverse=True), min_piece=min_piece)


def test_the_longer_run_keeps_the_common_part_but_leaves_a_useful_piece():
    text = list(range(300))
    long = Match(0, 200, ChunkKey.of(CONTEXT, text[:200]))
    short = Match(150, 204, ChunkKey.of(CONTEXT, text[150:204]))
    assert [m[:2] for m in longest_cover([long, short], min_piece=1)] == [(0, 200), (200, 204)]
    assert [m[:2] for m in longest_cover([long, short], min_piece=16)] == [(0, 188), (188, 204)]
    assert longest_cover([long, short], min_piece=16)[1].chunk_offset == 38


def test_of_runs_that_reach_equally_far_the_earliest_then_the_whole_chunk_wins():
    text = list(range(100))
    late = Match(20, 60, ChunkKey.of(CONTEXT, text[20:60]))
    part = Match(10, 60, ChunkKey.of(CONTEXT, text[5:60]), 5)
    whole = Match(10, 60, ChunkKey.of(CONTEXT, text[10:60]))
    first = Match(0, 30, ChunkKey.of(CONTEXT, text[:30]))
    assert longest_cover([late, part, whole], min_piece=1) == [whole]
    assert longest_cover([first, late, part, whole], min_piece=1) == [first.clipped(0, 10), whole]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=30), st.integers(1, 9))
def test_winnowing_keeps_the_rightmost_minimum_of_every_window(values: list[int], width: int):
    hashes = np.array(values, dtype=np.uint64)
    expected = set()
    for start in range(len(values) - width + 1):
        window = values[start : start + width]
        expected.add(start + width - 1 - window[::-1].index(min(window)))
    assert winnow(hashes, width).tolist() == sorted(expected)


@given(st.lists(st.integers(0, 2), max_size=40), st.integers(1, 8), st.integers(0, 2**64 - 1))
def test_equal_windows_hash_equally_wherever_they_stand(values: list[int], k: int, seed: int):
    hashes = WindowHasher(k)(np.array(values, dtype=np.int32), seed).tolist()
    windows = [tuple(values[i : i + k]) for i in range(len(values) - k + 1)]
    assert len(hashes) == len(windows)
    # Equal windows hash equally; different ones differ (but for chance of about 2**-50).
    assert len(set(hashes)) == len(set(windows))
    assert len(set(zip(hashes, windows, strict=True))) == len(set(windows))


class MatcherMachine(RuleBasedStateMachine):
    """Any order of adds, removals, re-adds and scans gives what a brute-force search gives."""

    added = Bundle("added")

    def __init__(self) -> None:
        super().__init__()
        self.matcher = ChunkMatcher(min_match=4, max_postings=NO_LIMIT, max_alignments=NO_LIMIT)
        self.chunks: dict[ChunkKey, list[int]] = {}

    @rule(target=added, chunk=texts)
    def add(self, chunk: list[int]) -> list[int]:
        key = ChunkKey.of(CONTEXT, chunk)
        assert self.matcher.add(key, chunk) == (key not in self.chunks)
        self.chunks[key] = chunk
        return chunk

    @rule(chunk=added)
    def add_again(self, chunk: list[int]) -> None:
        self.add(chunk)

    @rule(chunk=added)
    def remove(self, chunk: list[int]) -> None:
        key = ChunkKey.of(CONTEXT, chunk)
        assert self.matcher.remove(key) == (self.chunks.pop(key, None) is not None)

    @rule(chunk=consumes(added))
    def add_to_another_namespace(self, chunk: list[int]) -> None:
        key = ChunkKey.of(OTHER, chunk)
        if self.matcher.add(key, chunk):
            self.chunks[key] = chunk

    @rule(prompt=texts)
    def scan(self, prompt: list[int]) -> None:
        mine = [c for k, c in self.chunks.items() if k.namespace == CONTEXT.namespace]
        result = self.matcher.match(prompt, CONTEXT)
        assert set(result.runs) == brute_force_runs(mine, prompt, 4)

    @rule()
    def compact(self) -> None:
        self.matcher._index.compact()
        self.matcher._removed.clear()

    @invariant()
    def whole(self) -> None:
        assert len(self.matcher) == len(self.chunks)
        self.matcher.check_integrity()


MatcherMachine.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestMatcherMachine = MatcherMachine.TestCase


def random_chunks(count: int, length: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 50_000, length) for _ in range(count)]


def test_churn_compacts_the_index_and_keeps_it_right(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fingerprint_index, "_MIN_DEAD_TO_COMPACT", 32)
    monkeypatch.setattr(fingerprint_index, "_MAX_PENDING", 64)
    matcher = ChunkMatcher(min_match=16)
    chunks = random_chunks(300, 100)
    kept: list[np.ndarray] = []
    largest = 0
    for number, chunk in enumerate(chunks):
        matcher.add(ChunkKey.of(CONTEXT, chunk), chunk)
        kept.append(chunk)
        if len(kept) > 20:
            matcher.remove(ChunkKey.of(CONTEXT, kept.pop(0)))
        if number % 7 == 0:
            found = matcher.match(np.concatenate(kept[::-1]), CONTEXT).matches
            assert [m.key for m in found] == [ChunkKey.of(CONTEXT, c) for c in kept[::-1]]
        largest = max(largest, matcher._index.num_bytes)
    matcher.check_integrity()
    alone = ChunkMatcher(min_match=16)
    for chunk in kept:
        alone.add(ChunkKey.of(CONTEXT, chunk), chunk)
    assert (
        largest < 4 * alone._index.num_bytes
    )  # 280 of 300 are gone; their fingerprints must be too


def test_a_chunk_evicted_and_rebuilt_a_thousand_times_stays_easy_to_find():
    matcher = ChunkMatcher(max_postings=4)
    chunk = random_chunks(1, 400)[0]
    key = ChunkKey.of(CONTEXT, chunk)
    for _ in range(1000):
        matcher.add(key, chunk)
        assert matcher.remove(key)
    matcher.add(key, chunk)
    result = matcher.match(chunk, CONTEXT)
    assert not result.truncated
    assert result.matches == [Match(0, 400, key, 0)]


def test_one_token_repeated_is_covered_within_the_limits():
    matcher = ChunkMatcher()
    chunk = np.full(400, 7)
    matcher.add(ChunkKey.of(CONTEXT, chunk), chunk)
    result = matcher.match(np.full(4000, 7), CONTEXT)
    assert result.truncated
    assert union(result.matches) == set(range(4000))


def test_boiler_plate_in_very_many_chunks_does_not_hide_the_right_ones():
    header = random_chunks(1, 80, seed=1)[0]
    chunks = [np.concatenate([header, body]) for body in random_chunks(2000, 150)]
    matcher = ChunkMatcher()
    for chunk in chunks:
        matcher.add(ChunkKey.of(CONTEXT, chunk), chunk)
    prompt = np.concatenate([chunks[1700], chunks[3], header, [1, 2, 3]])
    result = matcher.match(prompt, CONTEXT)
    whole = [ChunkKey.of(CONTEXT, chunks[1700]), ChunkKey.of(CONTEXT, chunks[3])]
    assert [m.key for m in result.matches[:2]] == whole
    assert [m[:2] for m in result.matches[:2]] == [(0, 230), (230, 460)]
    assert result.matches[2][:2] == (460, 540)


def test_among_many_near_copies_the_one_that_fits_is_preferred():
    # 40 openings and 40 endings, each pair a chunk: every fingerprint is frequent.
    openings, endings = random_chunks(40, 100, seed=2), random_chunks(40, 100, seed=3)
    matcher = ChunkMatcher(max_postings=8)
    for opening in openings:
        for ending in endings:
            chunk = np.concatenate([opening, ending])
            matcher.add(ChunkKey.of(CONTEXT, chunk), chunk)
    prompt = np.concatenate([openings[31], endings[17]])
    result = matcher.match(prompt, CONTEXT)
    assert result.truncated
    assert union(result.matches) == set(range(200))
    assert result.matches == [Match(0, 200, ChunkKey.of(CONTEXT, prompt), 0)]


@pytest.mark.parametrize("offset", [0, 1, 31, 32, 63, 64, 200])
@pytest.mark.parametrize("start", [0, 1, 100, 336])
def test_a_run_of_exactly_the_stated_length_is_found_at_any_offset(offset: int, start: int):
    chunk = random_chunks(1, 400)[0]
    noise = random_chunks(1, 500, seed=9)[0]
    key = ChunkKey.of(CONTEXT, chunk)
    matcher = ChunkMatcher()
    matcher.add(key, chunk)
    piece = chunk[start : start + 64]
    prompt = np.concatenate([noise[:offset], piece, noise[offset:]])
    assert matcher.match(prompt, CONTEXT).matches == [Match(offset, offset + 64, key, start)]
    shorter = np.concatenate([noise[:offset], piece[:63], noise[offset:]])
    assert matcher.match(shorter, CONTEXT).matches == []


def test_another_tenant_finds_nothing():
    chunk = random_chunks(1, 200)[0]
    matcher = ChunkMatcher()
    matcher.add(ChunkKey.of(CONTEXT, chunk), chunk)
    assert matcher.match(chunk, OTHER).runs == []
    assert len(matcher.match(chunk, CONTEXT).runs) == 1


def test_ids_outside_any_vocabulary_match_nothing():
    chunk = random_chunks(1, 200)[0]
    matcher = ChunkMatcher()
    matcher.add(ChunkKey.of(CONTEXT, chunk), chunk)
    prompt = np.concatenate([np.full(100, 2**40), chunk, np.full(100, -1)])
    assert [m[:2] for m in matcher.match(prompt, CONTEXT).matches] == [(100, 300)]
    # 2**32 more must not be taken for the same token by a conversion to 32 bits.
    assert matcher.match(chunk + 2**32, CONTEXT).matches == []


def test_damage_to_the_index_is_noticed():
    chunk = random_chunks(1, 200)[0]
    key = ChunkKey.of(CONTEXT, chunk)
    for damage in ("lost", "foreign", "unsorted"):
        matcher = ChunkMatcher()
        matcher.add(key, chunk)
        matcher.match(chunk, CONTEXT)
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


# -- explicit spans and automatic finds together --------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(chunks_and_prompt(), st.integers(1, 6), st.integers(1, 5), st.data())
def test_explicit_spans_stay_whole_and_the_rest_is_covered_automatically(
    case: tuple[list[list[int]], list[int]], min_match: int, min_piece: int, data: st.DataObject
):
    chunks, prompt = case
    assume(prompt)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(prompt)), max_size=6)))
    spans = list(zip(cuts[::2], cuts[1::2], strict=False))
    explicit = [Match(a, b, ChunkKey.of(CONTEXT, prompt[a:b])) for a, b in spans]
    matcher = ChunkMatcher(min_match=min_match, max_postings=NO_LIMIT, max_alignments=NO_LIMIT)
    known = {ChunkKey.of(CONTEXT, c): c for c in chunks}
    for key, chunk in known.items():
        matcher.add(key, chunk)
    automatic = matcher.match(prompt, CONTEXT).matches
    merged = merge_matches(explicit, automatic, min_piece=min_piece)

    known |= {m.key: prompt[m.prompt_start : m.prompt_end] for m in explicit}
    assert_valid(merged, prompt, known)
    assert set(explicit) <= set(merged)
    # Brute force, token by token: what the automatic part may keep, and how long each piece is.
    taken = union(explicit)
    expected: set[int] = set()
    for match in automatic:
        piece: list[int] = []
        for position in range(match.prompt_start, match.prompt_end + 1):
            if position < match.prompt_end and position not in taken:
                piece.append(position)
            else:
                expected |= set(piece) if len(piece) >= min_piece else set()
                piece = []
    assert union(merged) == taken | expected


def test_explicit_matches_that_overlap_are_refused():
    key = ChunkKey.of(CONTEXT, [1, 2, 3])
    with pytest.raises(ChunkCacheError, match="overlap"):
        merge_matches([Match(0, 3, key), Match(2, 5, key)], [])
