"""An embedder and a splitter that cost nothing and whose every result can be foretold."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from retrievers import Chunk, Document

if TYPE_CHECKING:
    from numpy.typing import NDArray


class HashEmbedder:
    """Unit vectors drawn from the text's hash: equal text, equal vector, and instant.

    Attributes
    ----------
    texts : list of str
        Every text that was encoded, in order.
    """

    def __init__(self, dim: int = 16, fingerprint: str = "a" * 32) -> None:
        self.name = "hash"
        self.dim = dim
        self.fingerprint = fingerprint
        self.texts: list[str] = []

    def encode_documents(
        self, texts: Sequence[str], *, progress: Callable[[int], None] | None = None
    ) -> NDArray[np.float32]:
        """Vectors of texts, float32 ``(n, dim)``."""
        self.texts.extend(texts)
        out = np.empty((len(texts), self.dim), dtype=np.float32)
        for row, text in enumerate(texts):
            seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
            out[row] = np.random.default_rng(seed).normal(size=self.dim)
        out /= np.linalg.norm(out, axis=1, keepdims=True)
        return out

    def encode_query(self, text: str) -> NDArray[np.float32]:
        """Vector of a query, float32 ``(dim,)``."""
        row: NDArray[np.float32] = self.encode_documents([text])[0]
        return row


class LineSplitter:
    """One chunk per line that is not empty."""

    def __init__(self, **settings: object) -> None:
        self.settings: dict[str, Any] = {"kind": "line", **settings}
        self.tokenizer: Any = SimpleNamespace(fingerprint="characters")

    def split(self, document: Document) -> list[Chunk]:
        """Chunks of a document, in order; ``DOCUMENT#LINE`` is their id."""
        chunks, start = [], 0
        for number, line in enumerate(document.text.split("\n")):
            if line:
                chunks.append(
                    Chunk(
                        id=f"{document.id}#{number}",
                        document_id=document.id,
                        text=line,
                        title=document.title,
                        start=start,
                        end=start + len(line),
                        num_tokens=len(line),
                        path=document.path,
                        metadata=document.metadata,
                    )
                )
            start += len(line) + 1
        return chunks
