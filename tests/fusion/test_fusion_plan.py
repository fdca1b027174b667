"""Rows of a piece, against a plain definition."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from chunk_cache import ChunkKey, Match
from chunk_cache.policies import create_policy
from rag_pipeline.sglang_plugin.fusion.forward.plan import (
    Piece,
    early_rows,
    exact_end,
    fresh_positions,
    make_layout,
    ordinary_passes,
    reach,
    skipped_rows,
    stands_in_place,
    union_rows,
)
from rag_pipeline.sglang_plugin.fusion.forward.write_guard import ProtectedWriteError, WriteGuard

KEY = ChunkKey.of("0" * 32, [1])


@st.composite
def layouts(draw):
    length = draw(st.integers(2, 60))
    edges = sorted(draw(st.sets(st.integers(0, length), max_size=8)))
    spans = list(zip(edges[::2], edges[1::2], strict=False))
    start = draw(st.integers(0, length - 1))
    end = draw(st.integers(start + 1, length))
    return length, spans, start, end


@given(layouts())
def test_every_token_of_a_piece_is_fresh_or_loaded_and_the_last_is_computed(case):
    length, spans, start, end = case
    fresh = fresh_positions(spans, Piece(start=start, end=end, is_last=end == length)).tolist()
    loaded = {p for lo, hi in spans for p in range(lo, hi)}
    assert fresh == sorted({p for p in range(start, end) if p not in loaded} | {end - 1})
    assert skipped_rows(spans, start, end) == sum(p in loaded for p in range(start, end))


@given(layouts(), st.integers(1, 20))
def test_pieces_compute_together_what_one_piece_computes(case, size):
    length, spans, radix, _ = case
    spans = [(max(lo, radix), hi) for lo, hi in spans if hi > radix]
    layout = make_layout(
        spans, num_layers=4, prompt_len=length, radix_len=radix, exact_len=radix, qkv_share=0.2
    )
    policy = create_policy("epic", 0.4)
    whole = early_rows(policy, layout, Piece(start=radix, end=length, is_last=True))
    parts = []
    for lo in range(radix, length, size):
        hi = min(lo + size, length)
        parts.append(early_rows(policy, layout, Piece(start=lo, end=hi, is_last=hi == length)))
    assert torch.equal(torch.cat(parts), whole)
    assert set(whole.tolist()) <= set(layout.reused_positions().tolist())


def test_policies_with_a_signal_wait_for_the_last_piece():
    layout = make_layout(
        [(10, 90)], num_layers=30, prompt_len=100, radix_len=10, exact_len=10, qkv_share=0.2
    )
    policy = create_policy("query", 0.5)
    assert early_rows(policy, layout, Piece(start=10, end=50, is_last=False)).numel() == 0
    assert early_rows(policy, layout, Piece(start=50, end=100, is_last=True)) is None
    # No signal is needed where the budget leaves none, or all: those are known at once.
    assert (
        early_rows(
            create_policy("query", 0.0), layout, Piece(start=50, end=100, is_last=True)
        ).numel()
        == 0
    )
    assert (
        early_rows(
            create_policy("query", 1.0), layout, Piece(start=50, end=100, is_last=True)
        ).numel()
        == 80
    )


@st.composite
def runs_of_a_chunk(draw):
    """A prompt of few different tokens, a chunk that resembles it, and a run that both have in common."""
    tokens = st.integers(0, 1)
    prefix = draw(st.lists(tokens, max_size=4))
    chunk = draw(st.lists(tokens, min_size=1, max_size=8))
    prompt = prefix + draw(st.lists(tokens, min_size=1, max_size=10))
    if draw(st.booleans()):
        # The chunk in its own place, a token of it edited perhaps.
        prompt = [*prefix, *chunk, *draw(st.lists(tokens, max_size=3))]
        at = draw(st.integers(0, len(prompt) - 1))
        prompt[at] = draw(tokens)
    base = draw(st.sampled_from([len(prefix), len(prefix), len(prefix) + 1]))
    runs = [
        Match(start, start + length, KEY, offset)
        for start in range(len(prefix), len(prompt))
        for offset in range(len(chunk))
        for length in range(1, 1 + min(len(prompt) - start, len(chunk) - offset))
        if prompt[start : start + length] == chunk[offset : offset + length]
    ]
    assume(runs)
    return prompt, prefix, chunk, base, draw(st.sampled_from(runs))


@given(runs_of_a_chunk())
def test_a_run_is_exact_when_every_token_before_it_was_there_when_it_was_computed(case):
    prompt, prefix, chunk, base, run = case
    # KV of a token, by definition: it depends on its position and on all tokens up to it.
    computed = {base + i: (*prefix, *chunk[: i + 1]) for i in range(len(chunk))}
    shift = run.prompt_start - (base + run.chunk_offset)
    wanted = shift == 0 and all(
        computed[p] == tuple(prompt[: p + 1]) for p in range(run.prompt_start, run.prompt_end)
    )
    prefix_there = prompt[: len(prefix)] == prefix
    got = stands_in_place(
        np.asarray(prompt),
        run,
        prefix_len=len(prefix),
        chunk_ids=np.asarray(chunk, dtype=np.int32),
        base_position=base,
    )
    assert (got and prefix_there) == wanted


def test_exactness_ends_at_the_first_run_that_is_not_exact():
    assert exact_end([], 7) == 7
    assert exact_end([(20, 60, True), (60, 90, True), (90, 120, False)], 20) == 90
    # What stands in the gap is computed behind exact KV, so it is exact as well.
    assert exact_end([(20, 60, True), (61, 90, True)], 0) == 90
    assert exact_end([(30, 60, False), (60, 90, True)], 5) == 5


@given(layouts(), st.integers(0, 60), st.integers(0, 60))
def test_no_pass_writes_a_slot_that_its_request_does_not_own(case, protected, first):
    length, _, start, end = case
    slots = torch.randperm(3 * length, generator=torch.Generator().manual_seed(length))[:length]
    guard = WriteGuard(3 * length, [slots[:protected]])
    written = [slots[start:end], slots[first:]]
    wrong = min(start, first if first < length else length) < protected
    with pytest.raises(ProtectedWriteError) if wrong else contextlib.nullcontext():
        guard.check(written)


def test_a_pass_begins_no_request_in_front_of_its_own_part():
    guard = WriteGuard(40, [torch.arange(5), torch.arange(10, 10)])
    guard.check_rows([(0, 5), (1, 0)])
    with pytest.raises(ProtectedWriteError, match="position 4 of request 0"):
        guard.check_rows([(1, 0), (0, 4)])


def test_borrowed_slots_that_are_protected_are_replaced_and_told():
    guard = WriteGuard(40, [torch.tensor([7, 8])])
    assert not guard.is_spared
    free = torch.tensor([[9, 10], [11, 12]])
    assert torch.equal(guard.spare(free, 0), free)
    assert not guard.is_spared
    assert guard.spare(torch.tensor([[9, 8], [7, 12]]), 0).tolist() == [[9, 0], [0, 12]]
    assert guard.is_spared
    guard.spare(free, 0)
    assert guard.is_spared


def test_union_is_sorted_and_without_repetition():
    assert union_rows(torch.tensor([5, 9]), torch.tensor([2, 9, 7])).tolist() == [2, 5, 7, 9]


@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(1, 30)), min_size=1, max_size=6), st.data()
)
def test_ordinary_passes_compute_every_row_once_in_order_and_within_the_limit(sizes, data):
    ranges = [(start, start + size) for start, size in sizes]
    tails = [data.draw(st.integers(1, size)) for _, size in sizes]
    limit = data.draw(st.integers(1, 60))
    fills_last = data.draw(st.booleans())
    passes = ordinary_passes(ranges, tails, limit, fills_last=fills_last)
    done = [start for start, _ in ranges]
    for part in passes:
        assert [index for index, _, _ in part] == sorted({index for index, _, _ in part})
        for index, start, end in part:
            assert done[index] == start < end
            done[index] = end
    assert done == [end for _, end in ranges]
    rows = [sum(end - start for _, start, end in part) for part in passes]
    assert all(0 < count <= limit for count in rows[:-1])
    assert rows[-1] <= max(limit, sum(tails))
    # Every request ends in the last pass, with all rows whose output is wanted.
    assert [end for _, _, end in passes[-1]] == [end for _, end in ranges]
    assert all(end - start >= tails[index] for index, start, end in passes[-1])
    if not fills_last:
        assert rows[-1] == sum(tails)
    elif sum(size for _, size in sizes) <= limit:
        assert len(passes) == 1


@given(layouts(), st.integers(0, 60), st.floats(0, 1))
def test_a_piece_reaches_as_far_as_its_computed_rows_fit(case, limit, share):
    _, spans, start, end = case

    def computed(to):
        return to - start - int(skipped_rows(spans, start, to - 1) * share)

    furthest = max((e for e in range(start, end + 1) if computed(e) <= limit), default=start)
    assert reach(limit, start, end, computed) == furthest
