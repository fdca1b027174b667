"""Several retrievers, one ranking: reciprocal rank fusion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from retrievers.errors import RetrievalError
from retrievers.types import Chunk, Retriever, SearchHit


class HybridRetriever:
    """Fuses rankings by ``sum(weight / (k0 + rank))``, ranks counted from 1.

    Based on Cormack, Clarke and Büttcher, "Reciprocal Rank Fusion outperforms Condorcet and
    individual rank learning methods", SIGIR 2009, which sets ``k0 = 60``. Only ranks are used, so
    scores of different scales need no calibration. Deviation: optional weights.

    Parameters
    ----------
    retrievers : sequence of Retriever
        At least one.
    k0 : int
        Damping of the first ranks.
    depth : int
        Candidates taken from each retriever; at least the `k` of the search.
    weights : sequence of float, optional
        One per retriever; all 1 by default.
    """

    def __init__(
        self,
        retrievers: Sequence[Retriever],
        *,
        k0: int = 60,
        depth: int = 50,
        weights: Sequence[float] | None = None,
    ) -> None:
        if not retrievers:
            raise RetrievalError("hybrid retrieval needs at least one retriever, got none")
        if k0 < 0:
            raise RetrievalError(f"hybrid k0 must not be negative, got {k0}")
        if depth < 1:
            raise RetrievalError(f"hybrid depth must be at least 1, got {depth}")
        if weights is not None and (len(weights) != len(retrievers) or min(weights) < 0):
            raise RetrievalError(
                f"hybrid weights must be {len(retrievers)} numbers not below 0, got {list(weights)}"
            )
        self._retrievers = tuple(retrievers)
        self._k0 = k0
        self._depth = depth
        self._weights = tuple(weights) if weights is not None else (1.0,) * len(retrievers)

    def search(
        self, query: str, *, k: int, where: Mapping[str, object] | None = None
    ) -> list[SearchHit]:
        """Return at most `k` hits, best first; equal scores in the order of first appearance."""
        if k < 1:
            raise RetrievalError(f"k must be at least 1, got {k}")
        chunks: dict[str, Chunk] = {}
        scores: dict[str, float] = {}
        for retriever, weight in zip(self._retrievers, self._weights, strict=True):
            hits = retriever.search(query, k=max(k, self._depth), where=where)
            for rank, hit in enumerate(hits, start=1):
                chunks.setdefault(hit.chunk.id, hit.chunk)
                score = weight / (self._k0 + rank)
                scores[hit.chunk.id] = scores.get(hit.chunk.id, 0.0) + score
        # sorted() is stable, and a dict keeps the order of insertion.
        best = sorted(scores, key=lambda chunk_id: -scores[chunk_id])[:k]
        return [SearchHit(chunk=chunks[chunk_id], score=scores[chunk_id]) for chunk_id in best]
