"""Every policy is charged for all it computes: counts against a plain layer-by-layer tally."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chunk_cache.policies import ReuseLayout, ScoredPolicy, create_policy, qkv_share

LAYERS, SHARE = 30, 0.15625


def layout_of(lengths, question=20, layers=LAYERS, exact=40, gap=0, **extra):
    spans, at = [], exact
    for n in lengths:
        spans.append((at, at + n))
        at += n + gap
    return ReuseLayout(
        num_layers=layers,
        prompt_len=at + question,
        exact_len=exact,
        spans=tuple(spans),
        qkv_share=SHARE,
        **extra,
    )


SIX = layout_of([400] * 6)


def tally(layout, kept_by_layer, scoring=0):
    """Row-layers of the reused tokens: per layer (rows with QKV, rows after it), then the scoring pass."""
    return (
        sum(layout.qkv_share * a + (1 - layout.qkv_share) * b for a, b in kept_by_layer) + scoring
    )


def scored(policy, layout):
    return isinstance(policy, ScoredPolicy) and policy.needs_signal(layout)


def test_qkv_share_of_smollm2_135m():
    assert qkv_share(576, 9, 3, 64, 1536) == pytest.approx(0.156, abs=5e-4)


def test_cacheblend_at_15_percent_keeps_what_its_two_first_layers_leave():
    policy = create_policy("cacheblend:0.15", num_check_layers=1)
    (kept,) = policy.num_selected(SIX)
    # (0.15 * 30 - 1 - q) / (29 - q) of 2400 tokens, the 11.6% of the trial.
    assert kept == int(2400 * (0.15 * 30 - 1 - SHARE) / (29 - SHARE))
    assert kept / 2400 == pytest.approx(0.116, abs=1e-3)
    want = tally(SIX, [(2400, 2400), (2400, kept)] + [(kept, kept)] * 28)
    assert policy.computed_row_layers(SIX) == pytest.approx(want)
    assert want <= 0.15 * 2400 * 30 < want + 29


def test_gradual_filtering_falls_and_stays_within_the_budget():
    policy = create_policy("cacheblend:0.15")
    a, b, c = policy.num_selected(SIX)
    assert policy.signal(SIX).check_layers == (1, 2, 3)
    assert a > b > c > 0
    assert a == pytest.approx(1.5 * c, abs=1)
    want = tally(SIX, [(2400, 2400), (2400, a), (a, b), (b, c)] + [(c, c)] * 26)
    assert policy.computed_row_layers(SIX) == pytest.approx(want)
    assert policy.charged_ratio(SIX) == pytest.approx(0.15, abs=1e-3)


def test_checks_that_start_again_are_charged_as_such():
    layout = layout_of([400] * 6, probes_restart=True)
    policy = create_policy("cacheblend:0.15")
    a, b, c = policy.num_selected(layout)
    want = (1 + SHARE) * (2400 + 20) + (2 + SHARE) * (a + 20) + (3 + SHARE) * (b + 20) + 30 * c
    assert policy.computed_row_layers(layout) == pytest.approx(want)
    assert want <= 0.15 * 2400 * 30
    assert c < policy.num_selected(SIX)[-1]


def test_uncharged_cacheblend_keeps_the_nominal_share_and_says_what_it_costs():
    policy = create_policy("cacheblend", ratio=0.15, released=True, charge_overhead=False)
    assert policy.num_selected(SIX) == (360,)
    assert policy.signal(SIX).metric == "v"
    assert policy.signal(SIX).check_layers == (1,)
    assert policy.charged_ratio(SIX) > 0.18


def test_uncharged_gradual_filtering_averages_to_the_ratio_over_its_checks():
    counts = create_policy("cacheblend", ratio=0.15, charge_overhead=False).num_selected(SIX)
    assert sum(counts) / 3 == pytest.approx(360, abs=2)


def test_a_budget_below_the_check_itself_checks_nothing():
    policy = create_policy("cacheblend:0.03")
    assert policy.num_selected(SIX)[-1] == 0
    assert not scored(policy, SIX)
    assert policy.computed_row_layers(SIX) == 0
    assert policy.select(SIX).numel() == 0


def test_query_pays_for_its_scoring_pass():
    policy = create_policy("query", draft_tokens=0)
    (kept,) = policy.num_selected(SIX)
    assert policy.signal(SIX).layers == range(15, 24)
    assert kept == (360 * 30 - 20 * 24) // 30
    assert policy.computed_row_layers(SIX) == kept * 30 + 20 * 24
    assert policy.computed_fraction(SIX) == pytest.approx(
        (kept * 30 + 20 * 24 + 20 * 30) / (2420 * 30)
    )


def test_query_pays_for_fresh_text_between_chunks_too():
    with_gaps = layout_of([400] * 6, gap=10)
    assert with_gaps.num_fresh == 80
    policy = create_policy("query", draft_tokens=0)
    assert policy.num_selected(with_gaps) == ((360 * 30 - 80 * 24) // 30,)
    only_question = layout_of([400] * 6, gap=10, num_scoring_rows=30)
    assert policy.num_selected(only_question) == ((360 * 30 - 30 * 24) // 30,)


def test_query_pays_for_its_draft_and_for_the_way_to_the_logits():
    policy = create_policy("query", draft_tokens=5)
    assert policy.signal(SIX).draft_tokens == 5
    assert policy.num_selected(SIX) == (360 - 20 - 4,)
    assert policy.computed_row_layers(SIX) == (360 - 20 - 4) * 30 + 20 * 30 + 5 * 24


def test_query_drafts_nothing_where_half_of_the_budget_would_go():
    # 0.15 * 480 = 72 rows; 32 and 4 of them leave half, one more does not.
    policy = create_policy("query", draft_tokens=5)
    assert policy.signal(layout_of([480], question=32)).draft_tokens == 5
    shorter = layout_of([480], question=33)
    assert policy.signal(shorter).draft_tokens == 0
    plain = create_policy("query", draft_tokens=0)
    assert policy.num_selected(shorter) == plain.num_selected(shorter)
    assert policy.computed_row_layers(shorter) == plain.computed_row_layers(shorter)


@pytest.mark.parametrize("tokens", [-1, 65])
def test_a_draft_has_its_bounds(tokens):
    with pytest.raises(ValueError, match=r"draft_tokens is .*between 0 .none. and 64"):
        create_policy("query", draft_tokens=tokens)


@settings(max_examples=300, deadline=None)
@given(
    st.floats(0.01, 1),
    st.lists(st.integers(1, 120), min_size=1, max_size=4),
    st.integers(0, 60),
    st.integers(1, 40),
)
def test_query_on_short_prompts_never_becomes_silent_reuse(ratio, lengths, question, layers):
    layout = layout_of(lengths, question=question, layers=layers)
    policy = create_policy("query", ratio=ratio)
    (kept,) = policy.num_selected(layout)
    assert policy.charged_ratio(layout) <= ratio + 1e-6
    bought = int(ratio * layout.num_reused + 1e-6)
    assert kept > 0 or bought == 0
    assert kept >= bought // 5
    if not scored(policy, layout):
        assert kept == bought  # the scoring pass was not paid, so all of it goes to tokens
        assert torch.equal(policy.select(layout), create_policy("epic", ratio).select(layout))
        assert policy.shift_strength(layout) == 0.0


def test_query_scores_where_a_fifth_of_the_budget_is_left():
    policy = create_policy("query")
    # 24 layers for 30 rows out of 0.15 * 30 * n: paid in full by 160 tokens, four fifths of 200.
    assert not scored(policy, layout_of([199], question=30))
    assert policy.num_selected(layout_of([199], question=30)) == (29,)
    assert scored(policy, layout_of([200], question=30))
    assert policy.num_selected(layout_of([200], question=30)) == (6,)
    assert policy.shift_strength(layout_of([200], question=30)) == 0.4


@pytest.mark.parametrize("name", ["cacheblend", "adaptive", "query", "epic"])
def test_ratio_one_probes_nothing_and_computes_everything(name):
    options = {"max_ratio": 1.0} if name == "adaptive" else {}
    policy = create_policy(name, 1.0, **options)
    layout = layout_of([50, 60], layers=5, probes_restart=True)
    assert not scored(policy, layout)
    assert torch.equal(policy.select(layout), layout.reused_positions())
    assert policy.charged_ratio(layout) == 1.0


def test_checks_are_charged_for_the_fresh_rows_that_they_run():
    fewer = layout_of([400] * 6, probes_restart=True, num_scoring_rows=5)
    more = layout_of([400] * 6, probes_restart=True, num_scoring_rows=500)
    policy = create_policy("cacheblend:0.15")
    assert policy.num_selected(more)[-1] < policy.num_selected(fewer)[-1]
    assert policy.computed_row_layers(more) <= 0.15 * 2400 * 30


@pytest.mark.parametrize(
    ("layers", "want"), [(1, range(0, 1)), (2, range(1, 2)), (4, range(2, 4)), (24, range(12, 20))]
)
def test_scoring_layers_of_other_depths(layers, want):
    assert create_policy("query").signal(layout_of([100], layers=layers)).layers == want


def test_full_and_reuse_are_the_ends():
    full, reuse = create_policy("full"), create_policy("reuse")
    assert full.computed_fraction(SIX) == 1.0
    assert full.select(SIX).tolist() == list(range(40, 2440))
    assert reuse.computed_row_layers(SIX) == 0
    assert reuse.computed_fraction(SIX) == pytest.approx(20 / 2420)
    assert reuse.select(SIX).numel() == 0


lengths = st.lists(st.integers(0, 500), max_size=12)
names = st.sampled_from(["cacheblend", "epic", "query"])


@settings(max_examples=300, deadline=None)
@given(
    names,
    st.floats(0, 1),
    lengths,
    st.integers(0, 40),
    st.integers(1, 40),
    st.integers(0, 5),
    st.booleans(),
)
def test_no_policy_ever_spends_more_than_its_ratio(
    name, ratio, lengths, question, layers, gap, restart
):
    layout = layout_of(lengths, question=question, layers=layers, gap=gap, probes_restart=restart)
    policy = create_policy(name, ratio=ratio)
    counts = policy.num_selected(layout)
    assert all(a >= b for a, b in itertools.pairwise(counts))
    assert all(0 <= n <= layout.num_reused for n in counts)
    assert policy.computed_row_layers(layout) <= ratio * layout.num_reused * layers + 1e-3
    assert 0 <= policy.computed_fraction(layout) <= 1 + 1e-9
    if ratio == 1.0:
        assert counts[-1] == layout.num_reused


@settings(max_examples=150, deadline=None)
@given(names, st.floats(0, 1), lengths, st.integers(0, 40), st.integers(0, 2**31))
def test_what_is_selected_is_what_was_counted(name, ratio, lengths, question, seed):
    layout = layout_of(lengths, question=question)
    policy = create_policy(name, ratio=ratio)
    g = torch.Generator().manual_seed(seed)
    candidates = layout.reused_positions()
    counts = policy.num_selected(layout)
    if not scored(policy, layout):
        chosen = policy.select(layout)
        assert chosen.numel() == counts[-1]
    else:
        for stage, count in enumerate(counts):
            scores = torch.rand(candidates.numel(), generator=g)
            chosen = policy.choose(layout, scores, candidates, stage)
            assert chosen.numel() == count
            assert set(chosen.tolist()) <= set(candidates.tolist())
            candidates = chosen
    assert chosen.dtype == torch.int64
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    assert set(chosen.tolist()) <= set(layout.reused_positions().tolist())
