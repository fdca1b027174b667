"""Paired bootstrap: how sure a mean difference between two modes is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """Mean of paired differences and its percentile interval.

    Parameters
    ----------
    mean : float
        Mean of ``other - reference`` over examples.
    low, high : float
        2.5 and 97.5 percentile of the resampled means.
    n : int
        Number of pairs.
    """

    mean: float
    low: float
    high: float
    n: int


def paired_bootstrap(
    other: Sequence[float],
    reference: Sequence[float],
    *,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap over examples of the mean of ``other[i] - reference[i]``.

    Examples are resampled as pairs (Efron and Tibshirani 1993, chapter 13), so what both modes
    find hard does not widen the interval.

    Raises
    ------
    ValueError
        The two lists differ in length or are empty.
    """
    if len(other) != len(reference) or not other:
        raise ValueError(f"need equally many pairs, at least one: {len(other)}, {len(reference)}")
    differences = np.asarray(other, dtype=np.float64) - np.asarray(reference, dtype=np.float64)
    rng = np.random.default_rng(seed)
    picks = rng.integers(0, len(differences), size=(resamples, len(differences)))
    means = differences[picks].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(
        mean=float(differences.mean()), low=float(low), high=float(high), n=len(differences)
    )


def interval(other: Sequence[float], reference: Sequence[float], unit: float = 1.0) -> list[float]:
    """Low and high end of :func:`paired_bootstrap` in units of ``unit``, as a report has them."""
    found = paired_bootstrap(other, reference)
    return [round(found.low / unit, 5), round(found.high / unit, 5)]
