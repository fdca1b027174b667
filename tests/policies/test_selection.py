"""What each policy picks, against plain sorting."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chunk_cache.policies import (
    ReuseLayout,
    ScoredPolicy,
    balance_ratio,
    create_policy,
    policy_names,
    top_positions,
)


def layout(*spans, prompt_len=None, layers=10, **extra):
    return ReuseLayout(
        num_layers=layers,
        prompt_len=prompt_len or spans[-1][1] + 5,
        exact_len=4,
        spans=spans,
        **extra,
    )


def choose(policy, where, scores):
    return policy.choose(where, scores, where.reused_positions())


def test_equal_scores_go_to_the_earlier_position():
    candidates = torch.tensor([3, 5, 8, 9, 20])
    scores = torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0])
    assert top_positions(scores, candidates, 3).tolist() == [3, 5, 9]
    assert top_positions(torch.zeros(5), candidates, 2).tolist() == [3, 5]


def test_a_score_that_is_not_a_number_is_recomputed_first():
    scores = torch.tensor([1.0, float("nan"), 7.0])
    assert top_positions(scores, torch.tensor([0, 1, 2]), 1).tolist() == [1]


def test_selection_equals_a_plain_stable_sort():
    g = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 9, (500,), generator=g).float()
    candidates = torch.randperm(2000, generator=g)[:500].sort().values
    want = sorted(sorted(range(500), key=lambda i: (-scores[i].item(), i))[:77])
    assert top_positions(scores, candidates, 77).tolist() == [int(candidates[i]) for i in want]


def test_scores_must_belong_to_candidates():
    with pytest.raises(ValueError, match="one each is needed"):
        top_positions(torch.zeros(3), torch.zeros(4), 1)


def test_epic_takes_the_first_tokens_of_every_chunk():
    spans = layout((4, 24), (24, 27), (30, 60), (60, 60))
    policy = create_policy("epic:0.3")
    # 15 of 53: 6 + 3 + 6.
    assert policy.select(spans).tolist() == [*range(4, 10), *range(24, 27), *range(30, 36)]


def test_epic_gives_the_remainder_to_the_first_chunks_that_are_long_enough():
    policy = create_policy("epic", ratio=0.2)
    # 10 of 50: 3 each and one more for the first.
    assert policy.select(layout((4, 20), (20, 36), (36, 54))).tolist() == [
        4,
        5,
        6,
        7,
        20,
        21,
        22,
        36,
        37,
        38,
    ]


def test_epic_with_a_fixed_k():
    assert create_policy("epic", first_tokens=2).select(layout((4, 20), (20, 21))).tolist() == [
        4,
        5,
        20,
    ]


def test_query_takes_the_tokens_with_the_largest_mass_and_no_other():
    spans = layout((4, 54), (54, 104))
    policy = create_policy("query", ratio=0.2, first_share=0, draft_tokens=0)
    (count,) = policy.num_selected(spans)
    assert count == (20 * 10 - 5 * 8) // 10
    mass = torch.zeros(100)
    wanted = [3, 10, 11, 50, 51, 52, 70, 71, 72, 73, 80, 81, 90, 91, 98, 99]
    mass[wanted] = torch.linspace(1, 2, 16)
    assert choose(policy, spans, mass).tolist() == [w + 4 for w in wanted]


def test_query_spends_a_share_on_the_first_tokens_of_every_chunk():
    spans = layout((4, 54), (54, 104))
    policy = create_policy("query", ratio=0.2, first_share=0.5, draft_tokens=0)
    assert policy.num_selected(spans) == (16,)
    mass = torch.arange(100.0)  # the largest mass lies at the end of the second chunk
    firsts = [*range(4, 8), *range(54, 58)]
    assert choose(policy, spans, mass).tolist() == [*firsts, *range(96, 104)]
    # Never more than the chunk has, and the rest goes by mass.
    short = layout((4, 6), (6, 104))
    got = choose(policy, short, mass).tolist()
    assert got[:6] == [4, 5, 6, 7, 8, 9]
    assert len(got) == 16


def test_a_draft_chooses_its_share_of_what_the_question_left():
    spans = layout((4, 54), (54, 104))
    policy = create_policy("query", ratio=0.3, first_share=0, draft_tokens=2, draft_share=0.25)
    (count,) = policy.num_selected(spans)
    asked, drafted = torch.arange(100.0), torch.zeros(100)
    drafted[[0, 7, 8, 98, 99]] = torch.tensor([5.0, 2, 1, 9, 9])
    of_draft = int(0.25 * count)
    want = {99 - i for i in range(count - of_draft)} | {0, 7, 8}
    got = {p - 4 for p in choose(policy, spans, torch.stack([asked, drafted])).tolist()}
    assert len(got) == count
    assert want <= got
    # Without a share of its own the draft changes nothing.
    none = create_policy("query", ratio=0.3, first_share=0, draft_tokens=2, draft_share=0.0)
    alone = choose(none, spans, asked).tolist()
    assert choose(none, spans, torch.stack([asked, drafted])).tolist() == alone


def test_query_pools_within_chunks_only():
    spans = layout((4, 10), (10, 16), layers=1)
    policy = create_policy("query", ratio=0.9, pool=4, stop_layer=1.0, first_share=0)
    assert policy.num_selected(spans) == (5,)
    mass = torch.tensor([0, 0, 0, 0, 0, 1, 4, 0, 0, 0, 0, 0.0])
    # Chunk 1: blocks of 4 and 2 (means 0, .5); chunk 2: means 1 and 0. Nothing crosses the border at 10.
    assert choose(policy, spans, mass).tolist() == [8, 10, 11, 12, 13]


def test_query_without_a_question_is_epic():
    spans = layout((4, 54), (54, 104), prompt_len=104)
    policy = create_policy("query", ratio=0.2)
    assert not policy.needs_signal(spans)
    assert policy.select(spans).tolist() == create_policy("epic", ratio=0.2).select(spans).tolist()
    assert policy.charged_ratio(spans) == 0.2


def test_query_where_fresh_text_stands_before_the_chunks_only():
    spans = ReuseLayout(num_layers=10, prompt_len=100, exact_len=0, spans=((50, 100),))
    policy = create_policy("query", ratio=0.2)
    assert policy.select(spans).numel() == 10


def test_cacheblend_filters_the_candidates_of_the_stage_before():
    spans = layout((4, 204))
    policy = create_policy("cacheblend", ratio=0.5)
    first, second, third = policy.num_selected(spans)
    assert first > second > third
    g = torch.Generator().manual_seed(1)
    candidates = spans.reused_positions()
    for stage, count in enumerate((first, second, third)):
        scores = torch.rand(candidates.numel(), generator=g)
        order = scores.argsort(descending=True)[:count]
        got = policy.choose(spans, scores, candidates, stage)
        assert got.tolist() == candidates[order].sort().values.tolist()
        candidates = got


@pytest.mark.parametrize("name", ["cacheblend:0.5", "query:0.5", "adaptive:0.5"])
def test_a_missing_signal_is_named(name):
    with pytest.raises(ValueError, match="give scores"):
        create_policy(name).select(layout((4, 104)))


def test_controller_balances_loading_and_computing():
    assert balance_ratio(2.0, 0.5) == 0.25
    assert balance_ratio(0.5, 2.0) == 1.0
    assert balance_ratio(0.0, 2.0) == 1.0
    policy = create_policy("adaptive", ratio=0.15, max_ratio=0.4)
    fast = layout((4, 204), prefill_s=1.0, load_s=0.01)
    slow = layout((4, 204), prefill_s=1.0, load_s=0.3)
    slower = layout((4, 204), prefill_s=1.0, load_s=3.0)
    assert [policy.planned_ratio(x) for x in (fast, slow, slower)] == [0.15, 0.3, 0.4]
    assert policy.planned_ratio(layout((4, 204))) == 0.15


def test_adaptive_recomputes_more_where_the_deviation_is_spread_out():
    spans = layout((4, 204), layers=30)
    policy = create_policy("adaptive", ratio=0.15, max_ratio=0.6, coverage=0.5)
    (planned,) = policy.num_selected(spans)
    peaked = torch.zeros(200)
    peaked[:3] = 100.0
    assert choose(policy, spans, peaked).numel() == planned
    flat = torch.ones(200)
    assert choose(policy, spans, flat).numel() == 100
    (ceiling,) = create_policy("adaptive", ratio=0.6, max_ratio=0.6).num_selected(spans)
    wide = create_policy("adaptive", ratio=0.15, max_ratio=0.6, coverage=0.99)
    assert choose(wide, spans, flat).numel() == ceiling
    kept = (100,)
    assert policy.computed_row_layers(spans, kept) > policy.computed_row_layers(spans)


def test_interface_of_every_policy():
    for name in policy_names():
        policy = create_policy(name)
        assert policy.name == name
        empty = ReuseLayout(num_layers=30, prompt_len=9)
        assert isinstance(policy, ScoredPolicy) == (name in ("cacheblend", "query", "adaptive"))
        if isinstance(policy, ScoredPolicy):
            signal = policy.signal(empty)
            assert (signal.name == "deviation") == (name != "query")
            assert len(signal.layers if name == "query" else signal.check_layers) > 0
            # Requests with equal signals are probed together.
            assert {signal: 1}[create_policy(name).signal(empty)] == 1
        assert policy.select(empty).numel() == 0
        assert policy.charged_ratio(empty) == 0
        assert policy.computed_fraction(empty) == 1.0
    spans = layout((4, 404))
    assert create_policy("query").shift_strength(spans) == 0.4
    assert create_policy("query", mean_shift=0).shift_strength(spans) == 0.0


def test_a_model_of_one_layer_is_checked_at_layer_0():
    policy = create_policy("cacheblend")
    assert policy.signal(layout((4, 104), layers=1)).check_layers == (0,)
    assert policy.signal(layout((4, 104), layers=3)).check_layers == (1, 2)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (
            ("turbo",),
            {},
            r"policy 'turbo' is not known; choose one of full, reuse, cacheblend, epic, query, adaptive",
        ),
        ((7,), {}, "give a name"),
        (("cacheblend:lots",), {}, "'lots' is not a ratio; write cacheblend:0.15"),
        (("cacheblend:",), {}, "'' is not a ratio"),
        (("cacheblend:nan",), {}, "between 0 and 1"),
        (("cacheblend:0.1", 0.2), {}, "give one of them"),
        (("query", 1.5), {}, "ratio is 1.5; it must be between 0 and 1"),
        (("full", 0.5), {}, "takes no ratio"),
        (("reuse:0.5",), {}, "takes no ratio"),
        (("query",), {"window": 3}, "no option 'window'; allowed: ratio, first_layer"),
        (("query",), {"pool": 2.5}, "option pool is 2.5; expected int"),
        (("query",), {"pool": True}, "option pool is True"),
        (("query",), {"pool": 0}, "pool is 0"),
        (("query",), {"first_layer": 0.9}, "first_layer < stop_layer"),
        (("query",), {"ratio": "0.1"}, "option ratio is '0.1'"),
        (("cacheblend",), {"metric": "q"}, "expected one of k, v, kv"),
        (("cacheblend",), {"num_check_layers": 0}, "at least 1"),
        (("cacheblend",), {"num_check_layers": 79}, "at most 16"),
        (("cacheblend",), {"filter_spread": 1e308}, "at most 16"),
        (("cacheblend",), {"filter_spread": float("nan")}, "at most 16"),
        (("epic",), {"first_tokens": -1}, "0 or more"),
        (("adaptive",), {"max_ratio": 0.1}, "below ratio"),
    ],
)
def test_bad_policies_get_one_clear_line(arguments, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        create_policy(*arguments, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"spans": ((5, 3),)},
        {"spans": ((5, 9), (8, 12))},
        {"spans": ((5, 99),)},
        {"exact_len": 6, "spans": ((5, 9),)},
        {"exact_len": 21},
        {"num_layers": 0},
    ],
)
def test_impossible_layouts_are_refused(fields):
    with pytest.raises(ValueError, match="must"):
        ReuseLayout(**({"num_layers": 2, "prompt_len": 20} | fields))


@given(st.data())
def test_whatever_options_are_accepted_give_rows(data: st.DataObject) -> None:
    """A request may set them: what is accepted fails in no plan, for that would cost the whole batch."""
    name = data.draw(st.sampled_from(["cacheblend", "epic", "query", "adaptive"]))
    odd = st.sampled_from(
        [0, 1, -1, 2**53, 0.0, 0.3, 1.0, 1e308, -1e308, 1e-308, math.inf, math.nan, True, "v"]
    )
    config = type(create_policy(name).config)  # type: ignore[attr-defined]
    names = [field.name for field in dataclasses.fields(config)]
    options = data.draw(st.dictionaries(st.sampled_from(names), odd, max_size=3))
    try:
        policy = create_policy(name, **options)
    except ValueError:
        return
    where = layout((5, 60), (70, 100), prompt_len=120)
    counts = policy.num_selected(where)
    assert all(0 <= count <= where.num_reused for count in counts)
    assert math.isfinite(policy.computed_row_layers(where))
    assert math.isfinite(policy.shift_strength(where))
