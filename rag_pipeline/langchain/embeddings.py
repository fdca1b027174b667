"""Embedding models across the border: ours as LangChain ``Embeddings``, and theirs for our index."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from langchain_core.embeddings import Embeddings
from numpy.typing import NDArray

from retrievers import Embedder, RetrievalError, TextEmbedder

_NAME_FIELDS = ("model", "model_name", "model_id", "model_path", "repo_id", "deployment")


class RagEmbeddings(Embeddings):
    """One of our embedding models for LangChain.

    Parameters
    ----------
    embedder : TextEmbedder
        :class:`retrievers.Embedder` or anything with its methods.

    Examples
    --------
    >>> RagEmbeddings.load("all-minilm-l6-v2").embed_query("hello")  # doctest: +SKIP
    """

    def __init__(self, embedder: TextEmbedder) -> None:
        self.embedder = embedder

    @classmethod
    def load(cls, name: str = "all-minilm-l6-v2") -> RagEmbeddings:
        """Load a model.

        Parameters
        ----------
        name : str
            Packaged name, folder, or hub id.

        Raises
        ------
        ModelError
            A name that leads to no model.
        """
        from rag_pipeline.models import resolve_embedder

        return cls(Embedder(resolve_embedder(name).path, name=name))

    def embed_query(self, text: str) -> list[float]:
        """Vector of one query, unit length."""
        vector: list[float] = self.embedder.encode_query(text).tolist()
        return vector

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Vectors of passages, unit length."""
        vectors: list[list[float]] = self.embedder.encode_documents(texts).tolist()
        return vectors


class LangChainEmbedder:
    """A LangChain embedding model as :class:`retrievers.TextEmbedder`; its vectors are normalised.

    Parameters
    ----------
    embeddings : Embeddings
        The model.
    identity : str, optional
        What tells the model from others; an index is opened only with the identity it was built
        with. By default the class, the model's name where it has one, and the dimension.
    """

    def __init__(self, embeddings: Embeddings, identity: str | None = None) -> None:
        self.embeddings = embeddings
        kind = type(embeddings)
        named = {
            key: value
            for key in _NAME_FIELDS
            if isinstance(value := getattr(embeddings, key, None), str)
        }
        self._identity = identity or json.dumps([f"{kind.__module__}.{kind.__qualname__}", named])
        self._name = identity or next(iter(named.values()), kind.__name__)

    @property
    def name(self) -> str:
        """Readable name, for messages and the manifest."""
        return self._name

    @cached_property
    def dim(self) -> int:
        """Length of every vector, from embedding one word."""
        return len(self.embeddings.embed_query("dimension"))

    @property
    def fingerprint(self) -> str:
        """Hex digest over identity and dimension."""
        text = json.dumps(["langchain-embedder-1", self._identity, self.dim])
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def encode_query(self, text: str) -> NDArray[np.float32]:
        """Vector of one query, ``(dim,)`` float32, unit length."""
        vector: NDArray[np.float32] = self._unit([self.embeddings.embed_query(text)], 1)[0]
        return vector

    def encode_documents(
        self, texts: Sequence[str], *, progress: Callable[[int], None] | None = None
    ) -> NDArray[np.float32]:
        """Vectors of passages, ``(len(texts), dim)`` float32, unit length."""
        vectors = self._unit(self.embeddings.embed_documents(list(texts)), len(texts))
        if progress is not None:
            progress(len(texts))
        return vectors

    def _unit(self, vectors: Any, count: int) -> NDArray[np.float32]:
        found = np.asarray(vectors, dtype=np.float32).reshape(count, -1)
        if found.shape != (count, self.dim) and count:
            raise RetrievalError(
                f"embedding model {self.name} gave vectors of {found.shape[1]} dimensions, "
                f"{self.dim} before; use one model for the whole index"
            )
        return unit_vectors(found.reshape(count, self.dim), self.name)


def unit_vectors(vectors: NDArray[np.float32], name: str) -> NDArray[np.float32]:
    """Scale rows to unit length; `name` of the model is for the message.

    Raises
    ------
    RetrievalError
        For a vector that is zero or not finite: FAISS would rank it anywhere.
    """
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    if not np.isfinite(lengths).all() or (lengths == 0).any():
        raise RetrievalError(
            f"embedding model {name} gave a vector that is zero or not finite; such a text "
            "cannot be searched"
        )
    scaled: NDArray[np.float32] = (vectors / lengths).astype(np.float32)
    return scaled


def as_text_embedder(
    embedding: Embeddings | TextEmbedder, identity: str | None = None
) -> TextEmbedder:
    """Turn either kind of model into what an index needs.

    Raises
    ------
    RetrievalError
        Something that is no embedding model, or an `identity` for a model that has its own.
    """
    if isinstance(embedding, RagEmbeddings):
        embedding = embedding.embedder
    if isinstance(embedding, Embeddings):
        return LangChainEmbedder(embedding, identity)
    if not hasattr(embedding, "encode_documents"):
        raise RetrievalError(
            f"embedding is {type(embedding).__name__}; give LangChain Embeddings or a "
            "retrievers.Embedder"
        )
    if identity is not None:
        raise RetrievalError(
            f"embedding_id is {identity!r}, but {type(embedding).__name__} knows its own identity; "
            "leave it out"
        )
    return embedding
