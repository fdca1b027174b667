"""Search measured: latency of single queries and recall against exact search, for several indexes.

Vectors of 384 dimensions are made from real sentence embeddings (all-MiniLM-L6-v2 over lines of
``pydoc_data.topics``): each is a random convex mix of three real embeddings plus Gaussian noise of
0.3 times its length, normalised. That keeps the spread and the clusters of real text. Queries are
embeddings of lines that took no part.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rag_eval.datasets.filler import reference_lines
from retrievers import DenseIndex, Embedder

Vectors = NDArray[np.float32]
_NOISE = 0.3
_SEED = 7


def clustered_vectors(base: Vectors, count: int, seed: int = _SEED) -> Vectors:
    """Make unit vectors spread like `base`, see the module's text.

    Parameters
    ----------
    base : Vectors
        ``(m, dim)`` float32 real embeddings, unit length.
    count : int
        Vectors to make.
    seed : int
        Of the generator.

    Returns
    -------
    ndarray
        ``(count, dim)`` float32, unit length.
    """
    rng = np.random.default_rng(seed)
    out = np.empty((count, base.shape[1]), dtype=np.float32)
    for start in range(0, count, 10_000):
        stop = min(start + 10_000, count)
        picks = rng.integers(0, len(base), (stop - start, 3))
        weights = rng.dirichlet((0.5, 0.5, 0.5), stop - start).astype(np.float32)
        mixed = np.einsum("nk,nkd->nd", weights, base[picks])
        mixed /= np.linalg.norm(mixed, axis=1, keepdims=True)
        noise = rng.normal(size=mixed.shape).astype(np.float32)
        noise *= _NOISE / np.linalg.norm(noise, axis=1, keepdims=True)
        mixed += noise
        out[start:stop] = mixed / np.linalg.norm(mixed, axis=1, keepdims=True)
    return out


def measure_search(
    embedder: Embedder,
    *,
    count: int,
    num_queries: int,
    factories: Sequence[tuple[str, str]],
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """Latency of single queries and recall@10, for several factories."""
    lines = reference_lines()
    np.random.default_rng(_SEED).shuffle(lines)
    queries = embedder.encode_documents(lines[:num_queries])
    base = embedder.encode_documents(lines[num_queries : num_queries + 2000])
    vectors = clustered_vectors(base, count)
    labels = np.arange(count, dtype=np.int64)
    exact = np.empty((num_queries, 10), dtype=np.int64)
    for row, query in enumerate(queries):
        exact[row] = np.argsort(-(vectors @ query), kind="stable")[:10]
    results: dict[str, Any] = {}
    for factory, options in factories:
        progress(f"search: {factory} {options}")
        began = time.perf_counter()
        built = DenseIndex.build(vectors, labels, factory)
        build_s = time.perf_counter() - began
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "dense.faiss"
            built.save(path)
            del built
            index = DenseIndex.load(path, factory, options=options)
            for query in queries:  # the first touch reads the mapped pages
                index.search(query[None], 10)
            wall, found = [], []
            cpu_began = time.process_time()
            for query in queries:
                began = time.perf_counter()
                result, _ = index.search(query[None], 10)
                wall.append(time.perf_counter() - began)
                found.append(result[0])
            cpu_s = time.process_time() - cpu_began
            size = path.stat().st_size
        hits = [
            len(set(a) & set(b))
            for a, b in zip(np.array(found).tolist(), exact.tolist(), strict=True)
        ]
        results[f"{factory} {options}".strip()] = {
            "latency_p50_ms": 1e3 * statistics.median(wall),
            "latency_p95_ms": 1e3 * float(np.percentile(wall, 95)),
            "cpu_mean_ms": 1e3 * cpu_s / num_queries,
            "recall_at_10": sum(hits) / (10 * num_queries),
            "build_s": build_s,
            "file_mb": size / 1e6,
        }
    return {
        "vectors": count,
        "dim": int(vectors.shape[1]),
        "queries": num_queries,
        "data": "mixes of 3 of 2000 real MiniLM embeddings + 0.3 noise; queries real, held out",
        "factories": results,
    }
