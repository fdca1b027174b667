"""Segments of a conversation into episodes: k-means over their sentence vectors, and the segments that stand for each.

EpiCache (https://arxiv.org/abs/2509.17396), stage 1. k-means is scikit-learn's, with ten starts and a fixed seed. Own: episodes are
numbered by their earliest segment, since the order that k-means returns hangs on rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Vectors = NDArray[np.float32]

STARTS, SEED = 10, 42
"""Of k-means, as published."""

_DIGITS = 5
"""Of cosines that are compared: what lies closer together than rounding is a tie, and the earlier segment wins."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Episode:
    """One topic of a conversation, as it stood when it was found; it does not change when segments join.

    Attributes
    ----------
    index : int
        Its number in its clustering.
    medoids : tuple of int
        Numbers of the segments that stand for it, the closest to its centre first; none before the first clustering.
    opened_at : int
        Segments of the history when it was opened.
    parent : int or None
        The episode that it left at a switch of topic; None for one that a clustering found.
    branch_segment : int
        First segment that it does not share with its parent; 0 without one.
    """

    index: int
    medoids: tuple[int, ...]
    opened_at: int
    parent: int | None = None
    branch_segment: int = 0


def cluster(vectors: Vectors, episodes: int) -> list[int]:
    """Divide segments into episodes.

    Parameters
    ----------
    vectors : ndarray
        ``(segments, dim)`` float32, unit length.
    episodes : int
        How many; as many as there are different segments where those are fewer.

    Returns
    -------
    list of int
        Episode of each segment; numbered by their earliest segment.
    """
    from sklearn.cluster import KMeans

    count = min(episodes, len(np.unique(vectors, axis=0)))
    if count <= 1:
        return [0] * len(vectors)
    found = KMeans(n_clusters=count, n_init=STARTS, random_state=SEED).fit_predict(vectors)
    numbers: dict[int, int] = {}
    return [numbers.setdefault(int(label), len(numbers)) for label in found]


def medoids_of(vectors: Vectors, members: Sequence[int], count: int) -> tuple[int, ...]:
    """Return the `count` members closest to their centre, the closest first; ties go to the earlier one."""
    near = np.round(vectors[list(members)] @ unit(vectors[list(members)].mean(axis=0)), _DIGITS)
    order = sorted(range(len(members)), key=lambda place: (-near[place], members[place]))
    return tuple(members[place] for place in order[:count])


def centres_of(vectors: Vectors, labels: Sequence[int], count: int) -> Vectors:
    """Plain mean of each episode's segments, ``(count, dim)``; zeros for one without any."""
    centres = np.zeros((count, vectors.shape[1]), dtype=np.float32)
    rows = np.asarray(labels, dtype=np.int64)
    np.add.at(centres, rows, vectors[: len(rows)])
    centres /= np.maximum(1, np.bincount(rows, minlength=count))[:, None]
    return centres


def own_distances(vectors: Vectors, labels: Sequence[int]) -> list[float]:
    """Distance ``1 - cos`` of each segment from the centre of its episode's *other* segments.

    With its own vector in the centre a segment would lie closer than any that joins later, and every
    conversation would seem to drift. Segments that are alone in their episode are left out.
    """
    distances = []
    rows = np.asarray(labels)
    for label in set(labels):
        members = np.flatnonzero(rows == label)
        total = vectors[members].sum(axis=0)
        if len(members) > 1:
            distances += [float(1 - vectors[one] @ unit(total - vectors[one])) for one in members]
    return distances


def unit(vector: Vectors) -> Vectors:
    """Return it at length one; zeros stay zeros."""
    length = float(np.linalg.norm(vector))
    return vector / length if length else vector
