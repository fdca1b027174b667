"""No text is embedded twice: vectors come from the index, from an interrupted run, then the model."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from retrievers.embedding import Embedder
from retrievers.errors import RetrievalError
from retrievers.generation import Generation
from retrievers.ingest_report import IngestTally
from retrievers.journal import EmbeddingJournal, text_key
from retrievers.text_embedder import TextEmbedder

SHARD_CHUNKS = 128
"""Embeddings a shard of the journal holds, which is what an interruption can lose."""


class ReusingEmbedder:
    """Vectors of the texts of one ingest.

    Parameters
    ----------
    embedder : TextEmbedder
        Model for texts that are nowhere known.
    generation : Generation or None
        Current state of the index, ``None`` for a new one.
    journal : EmbeddingJournal
        Takes what is computed, and holds what an interrupted run had computed.
    tally : IngestTally
        Counts where the vectors came from; told after every shard.
    """

    def __init__(
        self,
        embedder: TextEmbedder,
        generation: Generation | None,
        journal: EmbeddingJournal,
        tally: IngestTally,
    ) -> None:
        self._embedder = embedder
        self._generation = generation
        self._journal = journal
        self._left_by_earlier_run = journal.snapshot()
        self._tally = tally

    def encode_documents(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Vectors of passages, ``(len(texts), dim)`` float32, unit length."""
        keys = [text_key(text) for text in texts]
        vectors = np.empty((len(texts), self._embedder.dim), dtype=np.float32)
        rows = np.full(len(texts), -1, dtype=np.int64)
        if self._generation is not None:
            rows = self._generation.rows_of_keys(keys)
            stored = np.flatnonzero(rows >= 0)
            vectors[stored] = self._generation.vectors[rows[stored]]
        others = np.flatnonzero(rows < 0)
        missing = {keys[i]: texts[i] for i in others if keys[i] not in self._journal}
        resumed = sum(1 for i in others if keys[i] in self._left_by_earlier_run)
        self._tally.resumed += resumed
        self._tally.reused += len(texts) - len(missing) - resumed
        self._tally.tell()
        self._embed(missing)
        if len(others):
            vectors[others] = self._journal.vectors([keys[i] for i in others])
        return vectors

    def _embed(self, texts: Mapping[bytes, str]) -> None:
        # Texts of like length together, so that little padding is computed; longest first, so
        # that a batch that does not fit in memory fails at once.
        order = sorted(texts, key=lambda key: -len(texts[key]))
        for start in range(0, len(order), SHARD_CHUNKS):
            keys = order[start : start + SHARD_CHUNKS]
            batch = [texts[key] for key in keys]
            began = time.perf_counter()
            # Whoever watches may stop it here too: a shard is a long time on a slow machine.
            rows = self._embedder.encode_documents(batch, progress=lambda _: self._tally.tell())
            vectors = _checked(rows, self._embedder)
            self._tally.embed_s += time.perf_counter() - began
            self._journal.append(keys, vectors)
            self._tally.embedded += len(keys)
            self._tally.truncated += _count_truncated(self._embedder, batch)
            self._tally.tell()


def _checked(vectors: NDArray[np.float32], embedder: TextEmbedder) -> NDArray[np.float32]:
    """Refuse vectors that would poison every search: FAISS orders NaN anywhere."""
    if not np.isfinite(vectors).all():
        raise RetrievalError(
            f"embedder {embedder.name} returned values that are not finite; try dtype float32"
        )
    return vectors


def _count_truncated(embedder: TextEmbedder, texts: Sequence[str]) -> int:
    if not isinstance(embedder, Embedder):
        return 0
    limit = embedder.max_tokens
    # A token is at least one character, so short texts need no counting.
    long = [text for text in texts if limit is not None and len(text) >= limit]
    return sum(1 for count in embedder.count_tokens(long) if limit and count > limit) if long else 0
