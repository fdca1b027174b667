"""Scores of answers, of next-token distributions and of retrieval, and their uncertainty."""

from rag_eval.metrics.answers import (
    exact_match,
    first_line,
    normalise,
    parts_found,
    rouge_l,
    token_f1,
)
from rag_eval.metrics.bootstrap import Interval, interval, paired_bootstrap
from rag_eval.metrics.distributions import answer_nll, kl_divergence, log_softmax
from rag_eval.metrics.locomo import locomo_f1
from rag_eval.metrics.retrieval import retrieval_scores

__all__ = [
    "Interval",
    "answer_nll",
    "exact_match",
    "first_line",
    "interval",
    "kl_divergence",
    "locomo_f1",
    "log_softmax",
    "normalise",
    "paired_bootstrap",
    "parts_found",
    "retrieval_scores",
    "rouge_l",
    "token_f1",
]
