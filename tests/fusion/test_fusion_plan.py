"""Rows of a piece, against a plain definition."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from chunk_cache.policies import create_policy
from rag_pipeline.sglang_plugin.fusion.plan import (
    Piece,
    early_rows,
    exact_end,
    fresh_positions,
    make_layout,
    skipped_rows,
    union_rows,
)


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


def test_exactness_ends_at_the_first_run_that_was_moved_or_does_not_follow():
    assert exact_end([], 7) == 7
    assert exact_end([(20, 60, 0), (60, 90, 0), (90, 120, 40)], 20) == 90
    assert exact_end([(20, 60, 0), (61, 90, 0)], 0) == 60
    assert exact_end([(30, 60, 10)], 5) == 5


def test_union_is_sorted_and_without_repetition():
    assert union_rows(torch.tensor([5, 9]), torch.tensor([2, 9, 7])).tolist() == [2, 5, 7, 9]
