"""LangChain's vector store over an index of ours on disk: FAISS vectors, no pickle, atomic changes."""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import VectorStore
from langchain_core.vectorstores.utils import maximal_marginal_relevance
from numpy.typing import NDArray

from rag_pipeline.langchain.arguments import (
    as_id,
    as_list,
    check_batch_size,
    per_text,
    refuse_unknown,
)
from rag_pipeline.langchain.document_folder import DocumentFolder
from rag_pipeline.langchain.documents import to_chunk, to_document
from rag_pipeline.langchain.embeddings import RagEmbeddings, as_text_embedder, unit_vectors
from rag_pipeline.langchain.metadata import as_where
from retrievers import RetrievalError, TextEmbedder


class FaissVectorStore(VectorStore):
    """Documents in an index folder that ``rag-pipeline`` and other processes open as it is.

    Every change writes the next state of the folder beside the current one and switches in one
    step, so add many documents with one call. Searches run while another thread or process changes
    the folder; they see the state before or after, and the next call sees the new one.

    Parameters
    ----------
    embedding : Embeddings or TextEmbedder
        LangChain ``Embeddings``, or a :class:`retrievers.Embedder`.
    index_dir : str, Path, optional
        Index folder, created with the first document. None keeps the documents in a temporary
        folder that goes with this object.
    embedding_id : str, optional
        Identity of a LangChain model; see :class:`.embeddings.LangChainEmbedder`.
    factory : str, optional
        See :class:`.DocumentFolder`.

    Raises
    ------
    EmbedderMismatchError
        Where the folder holds an index of another model.
    """

    def __init__(
        self,
        embedding: Embeddings | TextEmbedder,
        index_dir: str | Path | None = None,
        *,
        embedding_id: str | None = None,
        factory: str | None = None,
    ) -> None:
        self._embedding = embedding
        self._embedder = as_text_embedder(embedding, embedding_id)
        self._temporary = (
            tempfile.TemporaryDirectory(prefix="rag-index-") if index_dir is None else None
        )
        self.index_dir = Path(self._temporary.name if self._temporary else str(index_dir))
        self._folder = DocumentFolder(self.index_dir, self._embedder, factory=factory)

    @property
    def embeddings(self) -> Embeddings:
        """The model as LangChain sees it."""
        if isinstance(self._embedding, Embeddings):
            return self._embedding
        return RagEmbeddings(self._embedding)

    def __len__(self) -> int:
        """Documents in the store."""
        return len(self._folder)

    def reload(self) -> None:
        """Open the folder anew and compare every file with its checksum; changes are seen without it."""
        self._folder.check()

    # -- changes -----------------------------------------------------------------------------

    def add_texts(
        self,
        texts: Iterable[str],
        metadatas: Iterable[dict[str, Any] | None] | None = None,
        *,
        ids: Iterable[str | None] | None = None,
        **kwargs: Any,
    ) -> list[str]:
        """Add texts; see :meth:`add_documents`."""
        listed = as_list("texts", texts)
        given = per_text("metadatas", metadatas, len(listed))
        documents = [
            Document(page_content=text, metadata=metadata or {})
            for text, metadata in zip(listed, given, strict=True)
        ]
        return self.add_documents(documents, ids=ids, **kwargs)

    def add_documents(
        self,
        documents: Iterable[Document],
        *,
        ids: Iterable[str | None] | None = None,
        batch_size: int | None = None,
        **kwargs: Any,
    ) -> list[str]:
        """Add documents; one with an id that the store has replaces the old one.

        Parameters
        ----------
        documents : iterable of Document
            Not changed.
        ids : iterable of (str or None), optional
            One for each; by default, and where one is None, the document's own or a new random one.
        batch_size : int, optional
            Texts embedded at a time; all are written in one step whatever it is.
        **kwargs : object
            LangChain's signature has them; any that is given is refused.

        Returns
        -------
        list of str
            The ids.

        Raises
        ------
        RetrievalError
            Ids that do not fit, metadata that cannot be stored, or another process that changes
            the same folder.
        """
        refuse_unknown(kwargs)
        batch = check_batch_size(batch_size)
        listed = as_list("documents", documents)
        names = [
            as_id(wanted) or document.id or str(uuid.uuid4())
            for wanted, document in zip(per_text("ids", ids, len(listed)), listed, strict=True)
        ]
        # Of an id that occurs twice the last document stays, as if added one after the other.
        chunks = {
            name: to_chunk(document, chunk_id=name)
            for name, document in zip(names, listed, strict=True)
        }
        if chunks:
            self._folder.put(list(chunks.values()), batch_size=batch)
        return names

    def delete(self, ids: Iterable[str] | None = None, **kwargs: Any) -> bool:
        """Remove documents.

        Parameters
        ----------
        ids : iterable of str, optional
            Ids of documents; unknown ones are passed over. None removes everything.
        **kwargs : object
            LangChain's signature has them; any that is given is refused.

        Returns
        -------
        bool
            True: none of them is in the folder now.

        Raises
        ------
        RetrievalError
            For one chunk of a document that was ingested in several: delete the document.
        """
        refuse_unknown(kwargs)
        self._folder.remove(None if ids is None else [as_id(i) for i in as_list("ids", ids)])
        return True

    # -- reading -----------------------------------------------------------------------------

    def get_by_ids(self, ids: Iterable[str], /) -> list[Document]:
        """Documents with these ids, in that order; unknown ids are passed over."""
        wanted = [as_id(i) for i in as_list("ids", ids)]
        return [to_document(chunk) for chunk in self._folder.chunks(wanted)]

    def similarity_search(
        self,
        query: str,
        k: int = 4,
        filter: Mapping[str, object] | None = None,  # noqa: A002 (LangChain's name)
        **kwargs: Any,
    ) -> list[Document]:
        """Documents nearest to a query.

        Parameters
        ----------
        query : str
            The question.
        k : int
            Documents at most.
        filter : mapping, optional
            Metadata filter in the language of :mod:`retrievers.filters`; dates, UUIDs and the like
            may stand in it.
        **kwargs : object
            LangChain's signature has them; any that is given is refused.

        Returns
        -------
        list of Document
            Best first.
        """
        found = self.similarity_search_with_score(query, k, filter, **kwargs)
        return [document for document, _ in found]

    def similarity_search_with_score(
        self,
        query: str,
        k: int = 4,
        filter: Mapping[str, object] | None = None,  # noqa: A002
        **kwargs: Any,
    ) -> list[tuple[Document, float]]:
        """As :meth:`similarity_search`, each with its cosine in [-1, 1]."""
        refuse_unknown(kwargs)
        hits = self._folder.nearest(self._embedder.encode_query(query), k, as_where(filter))
        return [(to_document(hit.chunk), hit.score) for hit in hits]

    def similarity_search_by_vector(
        self,
        embedding: list[float],
        k: int = 4,
        filter: Mapping[str, object] | None = None,  # noqa: A002
        **kwargs: Any,
    ) -> list[Document]:
        """Documents nearest to a vector of any length above 0."""
        refuse_unknown(kwargs)
        hits = self._folder.nearest(self._as_query(embedding), k, as_where(filter))
        return [to_document(hit.chunk) for hit in hits]

    def max_marginal_relevance_search(
        self,
        query: str,
        k: int = 4,
        fetch_k: int = 20,
        lambda_mult: float = 0.5,
        filter: Mapping[str, object] | None = None,  # noqa: A002
        **kwargs: Any,
    ) -> list[Document]:
        """Documents that are near the query and unlike each other.

        Parameters
        ----------
        query, k, filter : str, int, mapping or None
            As for :meth:`similarity_search`.
        fetch_k : int
            Nearest documents to choose from; their texts are embedded for this.
        lambda_mult : float
            1 looks at nearness only, 0 at difference only.
        **kwargs : object
            LangChain's signature has them; any that is given is refused.
        """
        vector = self._embedder.encode_query(query).tolist()
        return self.max_marginal_relevance_search_by_vector(
            vector, k, fetch_k, lambda_mult, filter, **kwargs
        )

    def max_marginal_relevance_search_by_vector(
        self,
        embedding: list[float],
        k: int = 4,
        fetch_k: int = 20,
        lambda_mult: float = 0.5,
        filter: Mapping[str, object] | None = None,  # noqa: A002
        **kwargs: Any,
    ) -> list[Document]:
        """As :meth:`max_marginal_relevance_search`, for a vector."""
        refuse_unknown(kwargs)
        vector = self._as_query(embedding)
        hits = self._folder.nearest(vector, max(k, fetch_k), as_where(filter))
        if not hits:
            return []
        candidates = self._embedder.encode_documents([hit.chunk.text for hit in hits])
        chosen = maximal_marginal_relevance(vector, list(candidates), lambda_mult=lambda_mult, k=k)
        return [to_document(hits[i].chunk) for i in chosen]

    def _as_query(self, embedding: list[float]) -> NDArray[np.float32]:
        vector = np.asarray(embedding, dtype=np.float32)
        if vector.shape != (self._embedder.dim,):
            raise RetrievalError(
                f"the vector has shape {vector.shape}; this store has {self._embedder.dim} dimensions"
            )
        unit: NDArray[np.float32] = unit_vectors(vector[None], self._embedder.name)[0]
        return unit

    def _select_relevance_score_fn(self) -> Callable[[float], float]:
        return lambda cosine: min(1.0, max(0.0, (cosine + 1) / 2))

    @classmethod
    def from_texts(
        cls,
        texts: list[str],
        embedding: Embeddings,
        metadatas: list[dict[str, Any]] | None = None,
        *,
        ids: list[str] | None = None,
        **kwargs: Any,
    ) -> Self:
        """Make a store and add texts; keywords are those of the class."""
        store = cls(embedding, **kwargs)
        store.add_texts(texts, metadatas, ids=ids)
        return store
