"""A FAISS index over unit vectors, addressed by 64-bit labels."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retrievers.durable import create_file
from retrievers.errors import CorruptIndexError, RetrievalError
from retrievers.faiss_factory import (
    FLAT,
    capabilities,
    create_index,
    graph,
    import_faiss,
    inverted_file,
    prepare_training,
    set_options,
    to_gpu,
)

Vectors = NDArray[np.float32]
Labels = NDArray[np.int64]

_BLOCK = 8192
_MAX_TRAINING = 262_144
_SEED = 20_240_517


class DenseIndex:
    """A FAISS index with labels, additions, deletions and filtered search.

    Parameters
    ----------
    index : object
        FAISS index that takes ids (:func:`create_index`).
    factory : str
        String it was made from.

    Notes
    -----
    Vectors are compared by inner product and are expected at unit length, which makes the score
    the cosine.
    """

    def __init__(self, index: Any, factory: str) -> None:
        self._index = index
        self._search_index = index
        self.factory = factory
        self._can_remove: bool | None = None
        self._can_filter: bool | None = None

    @classmethod
    def build(cls, vectors: Vectors, labels: Labels, factory: str = FLAT) -> DenseIndex:
        """Train and fill a new index.

        Parameters
        ----------
        vectors : Vectors
            ``(n, dim)`` float32; may be mapped from disk, it is read in blocks.
        labels : Labels
            ``(n,)`` int64, distinct.
        factory : str
            FAISS factory string.

        Raises
        ------
        RetrievalError
            For a bad string or too few vectors to train on.
        """
        built = cls(create_index(vectors.shape[1], factory), factory)
        built._train(vectors)
        for start in range(0, len(labels), _BLOCK):
            built.add(labels[start : start + _BLOCK], vectors[start : start + _BLOCK])
        return built

    @classmethod
    def load(
        cls, path: Path, factory: str, *, mmap: bool = True, options: str = "", gpu: bool = False
    ) -> DenseIndex:
        """Read an index from disk.

        Parameters
        ----------
        path : Path
            File written by :meth:`save`.
        factory : str
            String it was made from.
        mmap : bool
            Map the file instead of reading it; the index can then not be changed.
        options : str
            FAISS parameter string.
        gpu : bool
            Search a copy on the GPU where faiss-gpu sees one.
        """
        faiss = import_faiss()
        flags = faiss.IO_FLAG_MMAP_IFC if mmap else 0
        try:
            index = faiss.read_index(str(path), flags)
        except RuntimeError as exc:
            raise CorruptIndexError(f"{path} is not a readable FAISS index; ingest again") from exc
        loaded = cls(index, factory)
        set_options(index, options)
        if gpu:
            loaded._search_index = to_gpu(index)
        return loaded

    def save(self, path: Path) -> None:
        """Write the index to `path`."""
        faiss = import_faiss()
        # FAISS' own writer reports a full disk as a fault of its library, and one at closing not at all.
        with create_file(path) as file:
            faiss.write_index(self._index, faiss.PyCallbackIOWriter(file.write))

    def __len__(self) -> int:
        return int(self._index.ntotal)

    @property
    def needs_training(self) -> bool:
        """Whether this kind of index learns from the vectors (IVF, PQ and their like)."""
        return not create_index(self.dim, self.factory).is_trained

    @property
    def dim(self) -> int:
        """Length of the vectors."""
        return int(self._index.d)

    @property
    def can_remove(self) -> bool:
        """Whether vectors can be deleted in place (false for graph indexes)."""
        if self._can_remove is None:
            self._can_remove = capabilities(create_index(self.dim, self.factory)).removes
        return self._can_remove

    def add(self, labels: Labels, vectors: Vectors) -> None:
        """Add vectors under labels that the index does not hold yet."""
        self._index.add_with_ids(
            np.ascontiguousarray(vectors, dtype=np.float32),
            np.ascontiguousarray(labels, dtype=np.int64),
        )

    def remove(self, labels: Labels) -> int:
        """Delete vectors and return how many there were.

        Raises
        ------
        RetrievalError
            Where this kind of index cannot delete; the message names kinds that can.
        """
        if not self.can_remove:
            raise RetrievalError(
                f"FAISS factory {self.factory!r} cannot delete vectors; use {FLAT!r} or "
                "'IVF256,Flat', or build the index anew"
            )
        return int(self._index.remove_ids(np.ascontiguousarray(labels, dtype=np.int64)))

    def upsert(self, labels: Labels, vectors: Vectors) -> None:
        """Replace the vectors of labels it holds, and add the others."""
        self.remove(labels)
        self.add(labels, vectors)

    def search(
        self, queries: Vectors, k: int, *, allowed: Labels | None = None
    ) -> tuple[Labels, Vectors]:
        """Nearest labels by inner product.

        Parameters
        ----------
        queries : Vectors
            ``(q, dim)`` float32, unit length.
        k : int
            Results a query.
        allowed : Labels, optional
            Only these labels may be returned; pushed down into FAISS.

        Returns
        -------
        labels, scores
            Both ``(q, k)``, best first; label -1 where there are fewer results.
        """
        if queries.ndim != 2 or queries.shape[1] != self.dim:
            raise RetrievalError(
                f"queries of shape {queries.shape} do not fit an index of {self.dim} dimensions"
            )
        if k < 1:
            raise RetrievalError(f"k must be at least 1, got {k}")
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        if allowed is None:
            scores, labels = self._search_index.search(queries, k)
        else:
            # GPU indexes take no selector, so a filtered search stays on the CPU.
            scores, labels = self._index.search(queries, k, params=self._selecting(allowed))
        return labels, scores

    @property
    def can_filter(self) -> bool:
        """Whether FAISS takes a selector for this kind of index (not for refining ones, NSG)."""
        if self._can_filter is None:
            query = np.zeros((1, self.dim), dtype=np.float32)
            try:
                self._index.search(query, 1, params=self._selecting(np.zeros(1, dtype=np.int64)))
                self._can_filter = True
            except RuntimeError:
                self._can_filter = False
        return self._can_filter

    def _selecting(self, allowed: Labels) -> Any:
        faiss = import_faiss()
        # Each form of parameters keeps Python references to its selector.
        selector = faiss.IDSelectorBatch(np.ascontiguousarray(allowed, dtype=np.int64))
        # A filter thins out every list and neighbourhood: look at proportionally more of them.
        share = max(len(allowed), 1) / max(len(self), 1)
        inverted = inverted_file(self._index)
        if inverted is not None:
            probes = min(int(inverted.nlist), math.ceil(int(inverted.nprobe) / share))
            return faiss.SearchParametersIVF(sel=selector, nprobe=probes)
        hnsw = graph(self._index)
        if hnsw is not None:
            effort = min(len(self), math.ceil(int(hnsw.hnsw.efSearch) / share))
            return faiss.SearchParametersHNSW(sel=selector, efSearch=effort)
        return faiss.SearchParameters(sel=selector)

    def _train(self, vectors: Vectors) -> None:
        if self._index.is_trained:
            return
        prepare_training(self._index, self.factory, len(vectors))
        if len(vectors) > _MAX_TRAINING:
            rows = np.random.default_rng(_SEED).choice(len(vectors), _MAX_TRAINING, replace=False)
            sample = vectors[np.sort(rows)]
        else:
            sample = vectors
        self._index.train(np.ascontiguousarray(sample, dtype=np.float32))


def exact_search(
    vectors: Vectors, rows: NDArray[np.int64], query: Vectors, k: int
) -> tuple[NDArray[np.int64], Vectors]:
    """Best of a few rows by direct comparison.

    Parameters
    ----------
    vectors : Vectors
        ``(n, dim)`` float32, may be mapped from disk.
    rows : ndarray
        Rows to compare, ascending.
    query : Vectors
        ``(dim,)`` float32.
    k : int
        Results at most.

    Returns
    -------
    rows, scores
        Best first; equal scores in row order.
    """
    scores = np.empty(len(rows), dtype=np.float32)
    for start in range(0, len(rows), _BLOCK):
        scores[start : start + _BLOCK] = vectors[rows[start : start + _BLOCK]] @ query
    best = top_k(scores, k)
    return rows[best], scores[best]


def top_k(scores: Vectors, k: int) -> NDArray[np.int64]:
    """Positions of the `k` highest scores, best first, ties by position."""
    k = min(k, len(scores))
    if k == 0:
        return np.empty(0, dtype=np.int64)
    if k < len(scores):
        # argpartition alone picks arbitrarily among ties at the border.
        border = np.partition(scores, len(scores) - k)[len(scores) - k]
        above = np.flatnonzero(scores > border)
        ties = np.flatnonzero(scores == border)[: k - len(above)]
        candidates = np.concatenate([above, ties])
    else:
        candidates = np.arange(len(scores))
    order = np.lexsort((candidates, -scores[candidates]))
    result: NDArray[np.int64] = candidates[order]
    return result
