"""The matcher against a brute-force one, on alphabets small enough for everything to collide."""

from __future__ import annotations

import dataclasses
from itertools import combinations

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
    KVContext,
    Match,
    merge_matches,
)
from chunk_cache.matching import longest_cover

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
                is_kept = len(piece) in (*range(min_piece, len(prompt) + 1), match.num_tokens)
                expected |= set(piece) if is_kept else set()
                piece = []
    assert union(merged) == taken | expected


def test_explicit_matches_that_overlap_are_refused():
    key = ChunkKey.of(CONTEXT, [1, 2, 3])
    with pytest.raises(ChunkCacheError, match="overlap"):
        merge_matches([Match(0, 3, key), Match(2, 5, key)], [])
