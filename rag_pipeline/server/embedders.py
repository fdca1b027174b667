"""Embedding models that all indexes of a server share: loaded once, used in turns."""

from __future__ import annotations

import threading
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


class SharedEmbedder(Embedder):
    """An embedder that several threads use; an ingest lets queries in between its batches."""

    def __init__(self, model: str | Path, *, name: str) -> None:
        super().__init__(model, name=name)
        # The tokenizer inside keeps the settings of its last call: two calls at once spoil each other.
        self._turns = Turns()
        self._loading = threading.RLock()

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
        with self._turns.turn():
            return super().encode_queries(texts)

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
