"""A LangChain retriever over one of our indexes."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from langchain_core.callbacks import (
    AsyncCallbackManagerForRetrieverRun,
    CallbackManagerForRetrieverRun,
)
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.retrievers import BaseRetriever
from pydantic import ConfigDict, Field

from rag_pipeline.langchain.documents import to_document
from rag_pipeline.langchain.embeddings import RagEmbeddings, as_text_embedder
from rag_pipeline.langchain.metadata import as_where
from retrievers import DistinctRetriever, LiveIndex, Manifest, RetrievalError, TextEmbedder


class RagRetriever(BaseRetriever):
    """Ranks chunks with a retriever of this project: dense, BM25, hybrid, or reranked.

    Parameters
    ----------
    retriever : object
        Anything with ``search(query, k=..., where=...)``, such as ``Index.retriever("hybrid")``.
    k : int
        Documents to return; ``invoke(query, k=...)`` overrides it.
    where : dict or None
        Filter on metadata (:mod:`retrievers.filters`); ``invoke(query, where=...)`` overrides it.

    Examples
    --------
    >>> retriever = RagRetriever.from_index("index", k=3)  # doctest: +SKIP
    >>> retriever.invoke("What is a decorator?", k=5)  # doctest: +SKIP
    """

    retriever: Any = Field(exclude=True)
    k: int = Field(default=4, ge=1)
    where: dict[str, Any] | None = None

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    @classmethod
    def from_index(
        cls,
        folder: str | Path,
        *,
        embedding: Embeddings | TextEmbedder | None = None,
        mode: str = "hybrid",
        **fields: Any,
    ) -> RagRetriever:
        """Open an index made by ``rag-pipeline ingest`` or :class:`.FaissVectorStore`.

        Every search sees the folder as it is then: what was added or deleted meanwhile, by this or
        another process.

        Parameters
        ----------
        folder : str or Path
            Index folder.
        embedding : Embeddings, TextEmbedder, optional
            Model of the index; None loads the one that the index names (mode ``bm25`` needs none).
        mode : str
            ``"hybrid"``, ``"dense"`` or ``"bm25"``.
        **fields
            `k`, `where`, and what every LangChain retriever takes (``tags``, ``metadata``).

        Raises
        ------
        RetrievalError
            No index there, or another model than it was built with.
        """
        if embedding is None and mode != "bm25":
            embedding = RagEmbeddings.load(Manifest.read(Path(folder)).embedder_name)
        embedder = None if embedding is None else as_text_embedder(embedding)
        live = LiveIndex(folder, embedder=embedder).retriever(mode)
        return cls(retriever=DistinctRetriever(live), **fields)

    def _get_relevant_documents(
        self,
        query: str,
        *,
        run_manager: CallbackManagerForRetrieverRun,
        k: int | None = None,
        where: Mapping[str, object] | None = None,
    ) -> list[Document]:
        return self._search(query, k, where)

    async def _aget_relevant_documents(
        self,
        query: str,
        *,
        run_manager: AsyncCallbackManagerForRetrieverRun,
        k: int | None = None,
        where: Mapping[str, object] | None = None,
    ) -> list[Document]:
        return await asyncio.to_thread(self._search, query, k, where)

    def _search(
        self, query: str, k: int | None, where: Mapping[str, object] | None
    ) -> list[Document]:
        wanted = self.k if k is None else k
        if isinstance(wanted, bool) or not isinstance(wanted, int) or wanted < 1:
            raise RetrievalError(f"k is {wanted!r}; it must be a whole number, at least 1")
        chosen = as_where(self.where if where is None else where)
        hits = self.retriever.search(query, k=wanted, where=chosen)
        return [to_document(hit.chunk, score=hit.score, source=True) for hit in hits]
