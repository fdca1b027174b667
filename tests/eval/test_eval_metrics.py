"""Metrics against numbers worked out from the published definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rag_eval.metrics import (
    answer_nll,
    exact_match,
    first_line,
    kl_divergence,
    locomo_f1,
    log_softmax,
    normalise,
    paired_bootstrap,
    parts_found,
    retrieval_scores,
    rouge_l,
    token_f1,
)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("The Cat, sat!", "cat sat"),
        ("  a  U.S. state ", "us state"),
        ("An apple a day", "apple day"),
        ("theatre", "theatre"),
        ("the", ""),
        ("Exeter   College.", "exeter college"),
    ],
)
def test_normalisation_is_that_of_squad(text: str, wanted: str) -> None:
    assert normalise(text) == wanted


@pytest.mark.parametrize(
    ("prediction", "answers", "wanted"),
    [
        ("the Rush", ["Rush"], 1.0),
        ("Rush band", ["Rush"], 0.0),
        ("rush", ["Yes", "RUSH!"], 1.0),
    ],
)
def test_exact_match(prediction: str, answers: list[str], wanted: float) -> None:
    assert exact_match(prediction, answers) == wanted


@pytest.mark.parametrize(
    ("prediction", "answers", "wanted"),
    [
        ("cat sat", ["cat sat on mat"], 2 * 1.0 * 0.5 / 1.5),
        ("a b c d", ["c d e"], 2 * (2 / 3) * (2 / 3) / (4 / 3)),  # "a" is an article
        ("x x y", ["x y y"], 2 * (2 / 3) * (2 / 3) / (4 / 3)),  # multiset, not set
        ("dog", ["cat"], 0.0),
        ("the", ["a"], 1.0),  # both normalise to nothing
        ("the", ["cat"], 0.0),
        ("green cat", ["red dog", "green cat"], 1.0),
        ("", ["cat"], 0.0),
    ],
)
def test_token_f1(prediction: str, answers: list[str], wanted: float) -> None:
    assert token_f1(prediction, answers) == pytest.approx(wanted)


def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence() -> None:
    # LCS("police killed the gunman", "police kill the gunman") = 3 of 4 and 4 (Lin 2004, 2.1)
    assert rouge_l("police kill the gunman", ["police killed the gunman"]) == pytest.approx(0.75)
    assert rouge_l("the gunman kill police", ["police killed the gunman"]) == pytest.approx(0.5)
    assert rouge_l("cat", ["dog", "cat"]) == 1.0


def test_parts_found_is_the_share_of_parts() -> None:
    assert parts_found("They are 123 and 456.", ["123", "789"]) == 0.5
    assert parts_found("ALPHA", ["alpha"]) == 1.0


def test_first_line() -> None:
    assert first_line("\n Rush \nQuestion: what") == "Rush"
    assert first_line("") == ""


def test_kl_of_known_distributions() -> None:
    p, q = np.log([[0.5, 0.5]]), np.log([[0.9, 0.1]])
    assert kl_divergence(p, q)[0] == pytest.approx(0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(5.0))
    assert kl_divergence(q, p)[0] == pytest.approx(0.9 * math.log(1.8) + 0.1 * math.log(0.2))
    assert kl_divergence(p, p)[0] == 0.0


def test_kl_ignores_what_the_reference_rules_out_and_shows_what_the_other_does() -> None:
    with np.errstate(divide="ignore"):
        p, q = np.log([[1.0, 0.0]]), np.log([[0.5, 0.5]])
    assert kl_divergence(p, q)[0] == pytest.approx(math.log(2))
    assert kl_divergence(q, p)[0] == math.inf
    with pytest.raises(ValueError, match="shapes"):
        kl_divergence(p, np.zeros((2, 2)))


@given(
    st.lists(st.floats(-30, 30), min_size=3, max_size=8),
    st.lists(st.floats(-30, 30), min_size=8, max_size=8),
)
def test_kl_is_not_negative_and_softmax_sums_to_one(one: list[float], other: list[float]) -> None:
    p = log_softmax(np.array([one], dtype=np.float32))
    q = log_softmax(np.array([other[: len(one)]], dtype=np.float32))
    assert np.exp(p).sum() == pytest.approx(1.0)
    assert kl_divergence(p, q)[0] >= 0
    shifted = log_softmax(np.array([one], dtype=np.float32) + np.float32(4.0))
    assert np.allclose(p, shifted, atol=1e-4)


def test_nll_is_the_mean_over_the_forced_tokens() -> None:
    log_probs = np.log([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]])
    assert answer_nll(log_probs, [1, 2]) == pytest.approx(-(math.log(0.25) + math.log(0.8)) / 2)
    with pytest.raises(ValueError, match="2 rows"):
        answer_nll(log_probs, [1])


def test_bootstrap_interval_of_a_constant_difference_is_a_point() -> None:
    found = paired_bootstrap([1.5, 2.5, 3.5], [1.0, 2.0, 3.0])
    assert (found.mean, found.low, found.high, found.n) == (0.5, 0.5, 0.5, 3)


def test_bootstrap_interval_matches_the_normal_one_on_many_pairs() -> None:
    rng = np.random.default_rng(1)
    reference = rng.normal(size=400)
    other = reference + 0.3 + rng.normal(scale=0.5, size=400)
    found = paired_bootstrap(list(other), list(reference))
    half = 1.96 * float(np.std(other - reference, ddof=1)) / 20
    assert found.low == pytest.approx(found.mean - half, abs=0.01)
    assert found.high == pytest.approx(found.mean + half, abs=0.01)
    assert paired_bootstrap(list(other), list(reference)) == found


def test_bootstrap_needs_pairs() -> None:
    with pytest.raises(ValueError, match="pairs"):
        paired_bootstrap([1.0], [])
    with pytest.raises(ValueError, match="pairs"):
        paired_bootstrap([], [])


def test_retrieval_scores_follow_trec() -> None:
    scores = retrieval_scores(
        {"q1": ["a", "b"], "q2": ["c"]}, {"q1": ["a", "x", "b"], "q2": ["x", "y", "z"]}, k=2
    )
    ideal = 1 + 1 / math.log2(3)
    assert scores["recall_at_k"] == pytest.approx((0.5 + 0) / 2)
    assert scores["ndcg_at_k"] == pytest.approx((1 / ideal + 0) / 2)


@pytest.mark.parametrize(
    ("said", "answer", "category", "score"),
    [
        ("She was running and painting", "painting, she runs", "single-hop", 6 / 7),
        ("north", "north, south", "multi-hop", 0.5),
        ("south, north", "north, south", "multi-hop", 1.0),
        ("yes", "Yes; since she collects books", "open-domain", 1.0),
        ("yes", "Yes; since she collects books", "single-hop", 2 / 6),
        ("", "one", "single-hop", 0.0),
        ("the", "a", "single-hop", 0.0),
    ],
)
def test_locomo_f1_is_the_published_score(
    said: str, answer: str, category: str, score: float
) -> None:
    # By hand: "she was running and painting" has the stems she, wa, run, paint.
    assert locomo_f1(said, answer, category) == pytest.approx(score)
