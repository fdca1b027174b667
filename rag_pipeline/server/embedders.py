"""Embedding models that all indexes of a server share: loaded once, used in turns."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rag_pipeline.server.turns import Turns
from retrievers import Embedder

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_BATCH = 16
_BATCH_CHARS = 4096
"""Passages, and characters of them, that are embedded before a waiting query gets its turn.

A thousand tokens or so: enough rows to keep two cores busy, and few enough that a search waits for little more than
its own embedding. A single passage may be longer; a model reads a few hundred tokens of it.
"""


_MOST_QUERIES = 32
"""Queries in one forward pass: the weights are read once for all of them, and eight take twice the time of one."""


class _Query:
    """Texts that wait for a pass, and what came of it."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = texts
        self.is_done = False
        self.error: Exception | None = None
        self.vectors: NDArray[np.float32] | None = None

    def end(
        self, vectors: NDArray[np.float32] | None = None, error: Exception | None = None
    ) -> None:
        """Note what came of it."""
        self.vectors, self.error, self.is_done = vectors, error, True


class SharedEmbedder(Embedder):
    """An embedder that several threads use.

    Queries that wait at the same time go through the model together, and an ingest lets them in between its batches.
    A vector then differs from that of the query alone by rounding, as in any padded batch.
    """

    def __init__(self, model: str | Path, *, name: str) -> None:
        super().__init__(model, name=name)
        # The tokenizer inside keeps the settings of its last call: two calls at once spoil each other.
        self._turns = Turns()
        self._loading = threading.RLock()
        self._queries: deque[_Query] = deque()

    @property
    def fingerprint(self) -> str:
        """Hex digest over weights, configuration, tokenizer, prompts and normalisation."""
        with self._loading:
            return super().fingerprint

    def _loaded(self) -> Any:
        # Sizes and fingerprints are asked for outside the turn; the model is loaded once all the same.
        with self._loading:
            return super()._loaded()

    def encode_queries(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Vectors of several queries, ``(len(texts), dim)`` float32, unit length."""
        mine = _Query(texts)
        self._queries.append(mine)
        with self._turns.turn():
            # Whoever had a turn before may have taken this query along.
            while not mine.is_done:
                self._encode_waiting()
        if mine.error is not None:
            raise mine.error
        assert mine.vectors is not None
        return mine.vectors

    def _encode_waiting(self) -> None:
        """Encode what waits, in one pass; only who has the turn may."""
        taken = [self._queries.popleft()]
        size = len(taken[0].texts)
        while self._queries and size + len(self._queries[0].texts) <= _MOST_QUERIES:
            taken.append(self._queries.popleft())
            size += len(taken[-1].texts)
        try:
            self._encode(taken)
        except Exception as error:
            if len(taken) == 1:
                taken[0].end(error=error)
                return
            # One of them has what the model cannot read; the others are not to suffer from it.
            for query in taken:
                try:
                    self._encode([query])
                except Exception as own:
                    query.end(error=own)

    def _encode(self, queries: Sequence[_Query]) -> None:
        vectors = super().encode_queries([text for query in queries for text in query.texts])
        start = 0
        for query in queries:
            end = start + len(query.texts)
            query.end(vectors[start:end])
            start = end

    def encode_documents(
        self, texts: Sequence[str], *, progress: Callable[[int], None] | None = None
    ) -> NDArray[np.float32]:
        """Vectors of passages, ``(len(texts), dim)`` float32, unit length, in the order given."""
        import numpy as np

        out = np.empty((len(texts), self.dim), dtype=np.float32)
        by_length = sorted(range(len(texts)), key=lambda row: -len(texts[row]))
        start = 0
        while start < len(by_length):
            # Padded to the first of them, which is the longest.
            fit = _BATCH_CHARS // max(1, len(texts[by_length[start]]))
            rows = by_length[start : start + min(_BATCH, max(1, fit))]
            start += len(rows)
            with self._turns.turn():
                out[rows] = super().encode_documents([texts[row] for row in rows])
            if progress is not None:
                progress(len(rows))
        return out

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text in the model's own tokenizer, without truncation or prompt."""
        with self._turns.turn():
            return super().count_tokens(texts)


class EmbedderPool:
    """One embedder a name, however many indexes were built with it."""

    def __init__(self, default: str) -> None:
        self.default = default
        self._made: dict[str, SharedEmbedder] = {}
        self._lock = threading.Lock()

    def get(self, name: str | None = None) -> SharedEmbedder:
        """Embedder by name, folder or hub id; the default one without a name."""
        from rag_pipeline.models import resolve_embedder

        wanted = name or self.default
        with self._lock:
            if wanted not in self._made:
                self._made[wanted] = SharedEmbedder(resolve_embedder(wanted).path, name=wanted)
            return self._made[wanted]
