"""What a FAISS factory string can do, checked on the index it makes and not on its name."""

from __future__ import annotations

import logging
import math
import re
from dataclasses import dataclass
from typing import Any

from retrievers.errors import RetrievalError

logger = logging.getLogger(__name__)

AUTO = "auto"
FLAT = "IDMap2,Flat"
FLAT_LIMIT = 20_000
"""Chunks up to which ``auto`` searches exactly; behind it a full scan costs milliseconds."""
RECOMMENDED_POINTS_PER_CENTROID = 39
"""k-means quality floor that FAISS itself warns below."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FactoryChoice:
    """A factory string and the search options that go with it."""

    factory: str
    search_options: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Capabilities:
    """What an index made from a factory string can do.

    Parameters
    ----------
    removes : bool
        Vectors can be deleted in place.
    trains_on : int
        Vectors training needs at least; 0 where there is no training.
    """

    removes: bool
    trains_on: int


def import_faiss() -> Any:
    """Import faiss, or raise an error that names the extra to install."""
    try:
        import faiss
    except ImportError as exc:
        raise ImportError(
            'FAISS is not installed: pip install "rag-pipeline[cpu]" (or [gpu], never both)'
        ) from exc
    if not hasattr(faiss, "index_factory"):
        # Both wheels own the folder; removing one leaves an empty namespace package behind.
        raise ImportError(
            "the faiss package is broken, usually because faiss-cpu and faiss-gpu were both "
            "installed; uninstall both and install one"
        )
    return faiss


def choose_factory(num_vectors: int) -> FactoryChoice:
    """Resolve ``auto`` to a factory.

    Parameters
    ----------
    num_vectors : int
        Vectors the index will hold.

    Returns
    -------
    FactoryChoice
        Exact search up to :data:`FLAT_LIMIT`, else inverted lists (about ``4 sqrt(n)``, a power
        of two) of full vectors, a sixteenth of which is probed. Both delete in place.
    """
    if num_vectors <= FLAT_LIMIT:
        return FactoryChoice(factory=FLAT, search_options="")
    lists = 2 ** round(math.log2(4 * math.sqrt(num_vectors)))
    return FactoryChoice(factory=f"IVF{lists},Flat", search_options=f"nprobe={lists // 16}")


def create_index(dim: int, factory: str) -> Any:
    """Make an empty inner-product index that takes 64-bit ids.

    Parameters
    ----------
    dim : int
        Length of the vectors.
    factory : str
        Any FAISS factory string; types that number their vectors themselves (``Flat``,
        ``HNSW32``) are wrapped in ``IDMap2``.

    Raises
    ------
    RetrievalError
        For a string FAISS does not understand or cannot build for inner product.
    """
    faiss = import_faiss()
    if not factory or not re.fullmatch(r"[\w,.()+-]+", factory):
        raise RetrievalError(
            f"FAISS factory {factory!r} is not valid; try {FLAT!r} or 'IVF256,Flat'"
        )
    try:
        index = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
        if not _takes_ids(faiss, index):
            index = faiss.index_factory(dim, f"IDMap2,{factory}", faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as exc:
        raise RetrievalError(
            f"FAISS factory {factory!r} cannot be built for {dim} dimensions and inner product: "
            f"{_reason(exc)}; try {FLAT!r} or 'IVF256,Flat'"
        ) from exc
    if index.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise RetrievalError(
            f"FAISS factory {factory!r} ignores the inner-product metric; try {FLAT!r}"
        )
    return index


def capabilities(index: Any) -> Capabilities:
    """Probe an index made by :func:`create_index`."""
    import numpy as np

    try:
        index.remove_ids(np.array([-1], dtype=np.int64))
        removes = True
    except RuntimeError:
        removes = False
    needed = 0
    if not index.is_trained:
        needed = max([1, *(count for _, count in _centroid_tables(index))])
    return Capabilities(removes=removes, trains_on=needed)


def prepare_training(index: Any, factory: str, num_vectors: int) -> None:
    """Check the training set once, in place of FAISS's line per table.

    Raises
    ------
    RetrievalError
        With fewer vectors than centroids, which FAISS cannot train at all.
    """
    tables = _centroid_tables(index)
    needed = max([1, *(count for _, count in tables)])
    if num_vectors < needed:
        raise RetrievalError(
            f"FAISS factory {factory!r} needs at least {needed} vectors to train and has "
            f"{num_vectors}; use {FLAT!r} or add documents"
        )
    if num_vectors < needed * RECOMMENDED_POINTS_PER_CENTROID:
        logger.warning(
            "FAISS factory %r trains %d centroids on %d vectors; fewer than %d (%d a centroid) "
            "lower the recall",
            factory,
            needed,
            num_vectors,
            needed * RECOMMENDED_POINTS_PER_CENTROID,
            RECOMMENDED_POINTS_PER_CENTROID,
        )
    for clustering, _ in tables:
        clustering.min_points_per_centroid = 1  # FAISS's own warning, said above


def set_options(index: Any, options: str) -> None:
    """Apply a FAISS parameter string such as ``"nprobe=16"`` or ``"efSearch=64"``.

    Raises
    ------
    RetrievalError
        For a parameter that this index does not have.
    """
    if not options:
        return
    faiss = import_faiss()
    try:
        faiss.ParameterSpace().set_index_parameters(index, options)
    except RuntimeError as exc:
        raise RetrievalError(
            f"search options {options!r} do not fit this index ({_reason(exc)}); use for example "
            "'nprobe=16' with IVF or 'efSearch=64' with HNSW"
        ) from exc


def to_gpu(index: Any) -> Any:
    """Copy `index` to the GPUs where faiss-gpu sees one, else return it as it is."""
    faiss = import_faiss()
    if not hasattr(faiss, "StandardGpuResources") or faiss.get_num_gpus() == 0:
        return index
    try:
        return faiss.index_cpu_to_all_gpus(index)
    except RuntimeError as exc:
        # HNSW, for one, has no GPU form.
        logger.warning("FAISS searches on the CPU: %s", _reason(exc))
        return index


def inverted_file(index: Any) -> Any | None:
    """Find the IVF part inside wrappers, or ``None``."""
    return import_faiss().try_extract_index_ivf(index)


def graph(index: Any) -> Any | None:
    """Find the HNSW part inside an id map, or ``None``."""
    faiss = import_faiss()
    inner = faiss.downcast_index(index)
    while hasattr(inner, "index") and not hasattr(inner, "hnsw"):
        inner = faiss.downcast_index(inner.index)
    return inner if hasattr(inner, "hnsw") else None


def _takes_ids(faiss: Any, index: Any) -> bool:
    inner = faiss.downcast_index(index)
    while isinstance(inner, faiss.IndexPreTransform):
        inner = faiss.downcast_index(inner.index)
    return isinstance(inner, faiss.IndexIVF | faiss.IndexIDMap | faiss.IndexIDMap2)


def _centroid_tables(index: Any) -> list[tuple[Any, int]]:
    """Every k-means of an index: its parameters and its number of centroids."""
    faiss = import_faiss()
    tables: list[tuple[Any, int]] = []
    stack = [index]
    while stack:
        inner = faiss.downcast_index(stack.pop())
        if isinstance(inner, faiss.IndexPreTransform):
            for position in range(inner.chain.size()):
                transform = faiss.downcast_VectorTransform(inner.chain.at(position))
                if isinstance(transform, faiss.OPQMatrix):
                    tables.append((_opq_quantizer(faiss, transform).cp, 256))
        for name in ("index", "base_index"):
            if hasattr(inner, name) and getattr(inner, name) is not None:
                stack.append(getattr(inner, name))
        if hasattr(inner, "nlist") and hasattr(inner, "cp"):
            tables.append((inner.cp, int(inner.nlist)))
        if hasattr(inner, "pq"):
            tables.append((inner.pq.cp, int(inner.pq.ksub)))
    return tables


def _opq_quantizer(faiss: Any, transform: Any) -> Any:
    """Give OPQ its inner 8-bit quantizer now, so that its k-means can be told things."""
    if transform.pq is None:
        quantizer = faiss.ProductQuantizer(transform.d_out, transform.M, 8)
        transform.pq = quantizer
        transform.quantizer_owner = quantizer  # the transform holds a bare pointer
    return transform.pq


def _reason(exc: Exception) -> str:
    """Cut a FAISS message down to what stands behind its C++ signature and source line."""
    text = " ".join(str(exc).split())
    return re.sub(r"^Error in .*?\.(?:cpp|h):\d+: (?:Error: )?", "", text)
