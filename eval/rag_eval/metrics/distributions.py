"""Distances between next-token distributions, exact over the whole vocabulary.

All functions take log-probabilities in float64: the KL divergence of two nearly equal
distributions is a small difference of large sums.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]


def log_softmax(logits: npt.ArrayLike) -> Float64:
    """Log-probabilities of `logits`.

    Parameters
    ----------
    logits : ArrayLike
        ``(rows, vocabulary)``, any float type.

    Returns
    -------
    ndarray
        ``(rows, vocabulary)``, float64.
    """
    values = np.asarray(logits, dtype=np.float64)
    shifted = values - values.max(axis=-1, keepdims=True)
    normaliser = np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return np.asarray(shifted - normaliser, dtype=np.float64)


def kl_divergence(reference: Float64, other: Float64) -> Float64:
    """KL(reference || other) of every row, in nats.

    Parameters
    ----------
    reference, other : Float64
        Log-probabilities ``(rows, vocabulary)``.

    Returns
    -------
    ndarray
        ``(rows,)``, at least 0 (rounding below 0 is cut off).
    """
    if reference.shape != other.shape:
        raise ValueError(f"shapes differ: {reference.shape} and {other.shape}")
    # exp(-inf) * -inf would be nan; a token the reference rules out adds nothing.
    weight = np.exp(reference)
    with np.errstate(invalid="ignore"):
        terms = np.where(weight > 0, weight * (reference - other), 0.0)
    return np.asarray(np.maximum(terms.sum(axis=-1), 0.0), dtype=np.float64)


def answer_nll(log_probs: Float64, answer_ids: Sequence[int]) -> float:
    """Mean negative log-likelihood of a teacher-forced answer, in nats a token.

    Parameters
    ----------
    log_probs : Float64
        ``(rows, vocabulary)``; row i predicts ``answer_ids[i]``.
    answer_ids : sequence of int
        Token ids of the answer.
    """
    if len(answer_ids) != len(log_probs):
        raise ValueError(f"{len(log_probs)} rows for {len(answer_ids)} answer tokens")
    picked = log_probs[np.arange(len(answer_ids)), np.asarray(answer_ids)]
    return float(-picked.mean())
