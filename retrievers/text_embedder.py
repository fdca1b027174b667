"""What an index needs of an embedding model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Vectors = NDArray[np.float32]


class TextEmbedder(Protocol):
    """What an index needs of an embedding model.

    Equal `fingerprint` promises equal vectors for equal text, within the arithmetic of the device.
    """

    @property
    def name(self) -> str:
        """Readable name, for messages and the manifest."""
        ...

    @property
    def dim(self) -> int:
        """Length of every vector."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hex digest over weights, tokenizer, prompts, normalisation and dimension."""
        ...

    def encode_query(self, text: str) -> Vectors:
        """Vector of one query, shape ``(dim,)``, float32, unit length."""
        ...

    def encode_documents(
        self, texts: Sequence[str], *, progress: Callable[[int], None] | None = None
    ) -> Vectors:
        """Vectors of passages, shape ``(len(texts), dim)``, float32, unit length."""
        ...
