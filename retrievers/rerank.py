"""Second stage: a cross-encoder reads query and passage together and reorders the first stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from retrievers.errors import RetrievalError
from retrievers.types import Retriever, SearchHit


class Reranker(Protocol):
    """Scores passages for a query; higher is better."""

    def score(self, query: str, passages: Sequence[str]) -> list[float]:
        """One score per passage, in the order given."""
        ...


class CrossEncoderReranker:
    """A sentence-transformers cross-encoder, loaded on first use.

    Parameters
    ----------
    model : str or Path
        Folder or hub id of a model with one output.
    device : str, optional
        Anything torch accepts; ``None`` takes the accelerator when there is one.
    batch_size : int
        Pairs per forward pass.
    """

    def __init__(
        self, model: str | Path, *, device: str | None = None, batch_size: int = 32
    ) -> None:
        if batch_size < 1:
            raise RetrievalError(f"reranker batch_size must be at least 1, got {batch_size}")
        self._source = str(model)
        self._device = device
        self._batch_size = batch_size
        self._model: Any = None

    def score(self, query: str, passages: Sequence[str]) -> list[float]:
        """One score per passage, in the order given."""
        if not passages:
            return []
        ranked = self._loaded().rank(
            query, list(passages), batch_size=self._batch_size, show_progress_bar=False
        )
        scores = [0.0] * len(passages)
        for entry in ranked:
            scores[int(entry["corpus_id"])] = float(entry["score"])
        return scores

    def _loaded(self) -> Any:
        if self._model is None:
            # Imported here: torch costs seconds.
            from sentence_transformers import CrossEncoder

            try:
                model = CrossEncoder(self._source, device=self._device)
            except (OSError, ValueError) as exc:
                reason = str(exc).splitlines()[0] if str(exc) else type(exc).__name__
                raise RetrievalError(f"cannot load the reranker {self._source}: {reason}") from exc
            if model.num_labels != 1:
                raise RetrievalError(
                    f"reranker {self._source} has {model.num_labels} outputs; "
                    "use a cross-encoder trained for ranking, which has one"
                )
            self._model = model
        return self._model


class RerankedRetriever:
    """Takes `depth` hits of another retriever and returns the reranker's best.

    Parameters
    ----------
    base : Retriever
        First stage.
    reranker : Reranker
        Second stage; its scores replace those of the first.
    depth : int
        Hits handed to the reranker; at least the `k` of the search.
    """

    def __init__(self, base: Retriever, reranker: Reranker, *, depth: int = 30) -> None:
        if depth < 1:
            raise RetrievalError(f"rerank depth must be at least 1, got {depth}")
        self._base = base
        self._reranker = reranker
        self._depth = depth

    def search(
        self, query: str, *, k: int, where: Mapping[str, object] | None = None
    ) -> list[SearchHit]:
        """Return at most `k` hits, best first; equal scores keep the order of the first stage."""
        if k < 1:
            raise RetrievalError(f"k must be at least 1, got {k}")
        hits = self._base.search(query, k=max(k, self._depth), where=where)
        scores = self._reranker.score(query, [hit.chunk.text for hit in hits])
        order = sorted(range(len(hits)), key=lambda position: -scores[position])[:k]
        return [SearchHit(chunk=hits[i].chunk, score=scores[i]) for i in order]
