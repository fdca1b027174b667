"""The FAISS index of the next generation: which one it is, and whether the old one is carried on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from retrievers.dense import DenseIndex
from retrievers.faiss_factory import AUTO, choose_factory, create_index, set_options
from retrievers.generation import DENSE_NAME, Generation
from retrievers.index_settings import IndexSettings
from retrievers.manifest import Manifest

_BLOCK_ROWS = 4096
_GROWTH_BEFORE_RETRAINING = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class DensePlan:
    """FAISS index a generation has or is to get.

    Parameters
    ----------
    requested : str
        Factory as asked for, maybe ``"auto"``.
    factory : str
        FAISS string it became.
    search_options : str
        FAISS parameter string stored with the index.
    """

    requested: str
    factory: str
    search_options: str

    @classmethod
    def of(cls, manifest: Manifest) -> DensePlan:
        """What the generation of a manifest has."""
        return cls(
            requested=manifest.factory_requested,
            factory=manifest.factory,
            search_options=manifest.search_options,
        )


def plan_dense(settings: IndexSettings, old: Manifest | None, num_rows: int) -> DensePlan:
    """Decide on the FAISS index of the next generation.

    Parameters
    ----------
    settings : IndexSettings
        What is wanted.
    old : Manifest or None
        Manifest of the current generation, ``None`` for a new index.
    num_rows : int
        Rows the next generation will hold.
    """
    requested = settings.factory or (old.factory_requested if old is not None else AUTO)
    if old is not None and old.factory_requested != requested:
        old = None  # another index is wanted: nothing of this one's settings carries over
    if requested != AUTO:
        factory, options = requested, old.search_options if old is not None else ""
    else:
        choice = choose_factory(num_rows)
        factory, options = choice.factory, choice.search_options
        # A trained index stays while it fits roughly; training anew at every step does not pay.
        if old is not None and old.num_trained and factory.startswith("IVF"):
            ratio = num_rows / old.num_trained
            if 1 / _GROWTH_BEFORE_RETRAINING < ratio < _GROWTH_BEFORE_RETRAINING:
                factory, options = old.factory, old.search_options
    if settings.search_options is not None:
        options = settings.search_options
    return DensePlan(requested=requested, factory=factory, search_options=options)


def write_dense(
    path: Path,
    plan: DensePlan,
    *,
    vectors: NDArray[np.float32],
    labels: NDArray[np.int64],
    current: Generation | None,
    kept: NDArray[np.int64],
) -> int:
    """Write the FAISS index of the next generation.

    Parameters
    ----------
    path : Path
        File to write.
    plan : DensePlan
        From :func:`plan_dense`.
    vectors, labels : NDArray
        Of every row of the next generation: first those that stay, then the new ones.
    current : Generation or None
        Current generation, ``None`` for a new index.
    kept : ndarray
        Rows of the current generation that stay.

    Returns
    -------
    int
        Vectors the index was trained on; 0 where it needs no training.
    """
    if current is not None and current.manifest.factory == plan.factory:
        carried = _carry_on(current, kept, vectors, labels)
        if carried is not None:
            carried.save(path)
            return current.manifest.num_trained
    built = DenseIndex.build(vectors, labels, plan.factory)
    built.save(path)
    set_options(create_index(built.dim, plan.factory), plan.search_options)
    return len(labels) if built.needs_training else 0


def _carry_on(
    current: Generation,
    kept: NDArray[np.int64],
    vectors: NDArray[np.float32],
    labels: NDArray[np.int64],
) -> DenseIndex | None:
    """Bring the current FAISS index up to date, or return ``None`` where it has to be built anew.

    Building costs no embedding: the vectors are stored.
    """
    num_trained = current.manifest.num_trained
    if num_trained and len(labels) > num_trained * _GROWTH_BEFORE_RETRAINING:
        return None
    removed = np.setdiff1d(np.arange(current.num_rows), kept, assume_unique=True)
    dense = DenseIndex.load(current.folder / DENSE_NAME, current.manifest.factory, mmap=False)
    if len(removed):
        if not dense.can_remove:  # graph indexes
            return None
        dense.remove(np.array(current.labels[removed]))
    for start in range(len(kept), len(labels), _BLOCK_ROWS):
        stop = start + _BLOCK_ROWS
        dense.add(labels[start:stop], vectors[start:stop])
    return dense
