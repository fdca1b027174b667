"""A LangChain vector store over our index on disk: FAISS vectors, no pickle, atomic changes."""

from __future__ import annotations

import tempfile
import threading
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import VectorStore
from langchain_core.vectorstores.utils import maximal_marginal_relevance
from numpy.typing import NDArray

from rag_pipeline.langchain.documents import to_chunk, to_document
from rag_pipeline.langchain.embeddings import RagEmbeddings, as_text_embedder, unit_vectors
from retrievers import Index, IndexSettings, IndexWriter, Manifest, RetrievalError, TextEmbedder
from retrievers.index_settings import document_hash
from retrievers.manifest import MANIFEST_NAME
from retrievers.types import Chunk, SearchHit
from retrievers.types import Document as SourceDocument

_BATCH = 512


class FaissVectorStore(VectorStore):
    """Documents in an index folder that ``rag-pipeline`` and other processes open as it is.

    Every change writes the next state of the folder beside the current one and switches in one
    step, so add many documents with one call. Searches run while another thread changes the
    store; they see the state before or after.

    Parameters
    ----------
    embedding
        LangChain ``Embeddings``, or a :class:`retrievers.Embedder`.
    index_dir
        Index folder, created with the first document. None keeps the documents in a temporary
        folder that goes with this object.
    embedding_id
        Identity of a LangChain model; see :class:`.embeddings.LangChainEmbedder`.
    factory
        FAISS factory string of a new index, or ``"auto"``.

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
        self._factory = factory
        self._change = threading.Lock()
        self._index: Index | None = None
        self.reload()

    @property
    def embeddings(self) -> Embeddings:
        """The model as LangChain sees it."""
        if isinstance(self._embedding, Embeddings):
            return self._embedding
        return RagEmbeddings(self._embedding)

    def __len__(self) -> int:
        """Documents in the store."""
        return 0 if self._index is None else len(self._index)

    def reload(self) -> None:
        """See what another process has changed."""
        # NOTE: the old state is not closed: a search in another thread may still read it. Its
        # files are released when the last one lets go.
        if (self.index_dir / MANIFEST_NAME).exists():
            self._index = Index.open(self.index_dir, embedder=self._embedder)
        else:
            self._index = None

    # -- changes -----------------------------------------------------------------------------

    def add_texts(
        self,
        texts: Iterable[str],
        metadatas: list[dict[str, Any]] | None = None,
        *,
        ids: list[str] | None = None,
        **kwargs: Any,
    ) -> list[str]:
        """Add texts; see :meth:`add_documents`."""
        listed = list(texts)
        _check_length("metadatas", metadatas, len(listed))
        metadatas = metadatas or [{} for _ in listed]
        documents = [
            Document(page_content=text, metadata=metadata)
            for text, metadata in zip(listed, metadatas, strict=True)
        ]
        return self.add_documents(documents, ids=ids, **kwargs)

    def add_documents(
        self, documents: list[Document], *, ids: Sequence[str | None] | None = None, **kwargs: Any
    ) -> list[str]:
        """Add documents; one with an id that the store has replaces the old one.

        Parameters
        ----------
        documents
            Not changed.
        ids
            One for each; by default the documents' own, or new random ones.

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
        _refuse_unknown(kwargs)
        _check_length("ids", ids, len(documents))
        given = list(ids) if ids is not None else [None] * len(documents)
        names = [
            wanted or document.id or str(uuid.uuid4())
            for wanted, document in zip(given, documents, strict=True)
        ]
        # Of an id that occurs twice the last document stays, as if added one after the other.
        chunks = {
            name: to_chunk(document, chunk_id=name)
            for name, document in zip(names, documents, strict=True)
        }
        if chunks:
            self._write(list(chunks.values()))
        return names

    def delete(self, ids: list[str] | None = None, **kwargs: Any) -> bool:
        """Remove documents.

        Parameters
        ----------
        ids
            Ids of documents; unknown ones are passed over. None removes everything.

        Returns
        -------
        bool
            True.

        Raises
        ------
        RetrievalError
            For one chunk of a document that was ingested in several: delete the document.
        """
        _refuse_unknown(kwargs)
        with self._change:
            if self._index is None:
                return True
            with IndexWriter(self.index_dir, self._settings()) as writer:
                if ids is None:
                    removed = writer.document_ids()
                else:
                    removed = [name for name in map(self._document_of, ids) if name is not None]
                gone = [writer.remove_document(name) for name in dict.fromkeys(removed)]
                if any(gone):
                    writer.commit()
            self.reload()
        return True

    def _write(self, chunks: list[Chunk]) -> None:
        # Embedding is the slow part and needs no lock.
        batches = [chunks[start : start + _BATCH] for start in range(0, len(chunks), _BATCH)]
        vectors = [
            self._embedder.encode_documents([chunk.text for chunk in batch]) for batch in batches
        ]
        with self._change:
            settings = self._settings()
            with IndexWriter(self.index_dir, settings) as writer:
                for chunk in chunks:
                    # An id may name a chunk of a document that was ingested from a file.
                    writer.remove_document(self._document_of(chunk.id) or chunk.id)
                    writer.put_document(chunk.id, document_hash(_as_source(chunk), settings))
                for batch, found in zip(batches, vectors, strict=True):
                    writer.append(batch, found)
                writer.commit()
            self.reload()

    def _settings(self) -> IndexSettings:
        """Settings of the folder where there is one: what was ingested there stays valid."""
        manifest = self._index.manifest if self._index is not None else None
        if (self.index_dir / MANIFEST_NAME).exists():
            manifest = Manifest.read(self.index_dir)
        return IndexSettings(
            embedder_name=self._embedder.name,
            embedder_fingerprint=self._embedder.fingerprint,
            dim=self._embedder.dim,
            splitter=manifest.splitter if manifest else {"kind": "langchain"},
            tokenizer_fingerprint=manifest.tokenizer_fingerprint if manifest else "",
            factory=None if manifest else self._factory,
            # LangChain users expect a vector of the text alone.
            include_title=manifest.include_title if manifest else False,
        )

    def _document_of(self, name: str) -> str | None:
        """Name of the document to remove for an id; None where there is nothing."""
        if self._index is None:
            return None
        try:
            chunk = self._index.chunk(name)
        except RetrievalError:
            return name
        if chunk.document_id != name:
            count = {record.id: record.num_chunks for record in self._index.documents()}
            if count[chunk.document_id] > 1:
                raise RetrievalError(
                    f"{name!r} is one of {count[chunk.document_id]} chunks of the document "
                    f"{chunk.document_id!r}; change the whole document by that id"
                )
        return chunk.document_id

    # -- reading -----------------------------------------------------------------------------

    def get_by_ids(self, ids: Sequence[str], /) -> list[Document]:
        """Documents with these ids, in that order; unknown ids are passed over."""
        found = []
        for name in dict.fromkeys(ids):
            try:
                if self._index is not None:
                    found.append(to_document(self._index.chunk(name)))
            except RetrievalError:
                continue
        return found

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
        query
            The question.
        k
            Documents at most.
        filter
            Metadata filter in the language of :mod:`retrievers.filters`.

        Returns
        -------
        list of Document
            Best first.
        """
        return [
            document
            for document, _ in self.similarity_search_with_score(query, k, filter, **kwargs)
        ]

    def similarity_search_with_score(
        self,
        query: str,
        k: int = 4,
        filter: Mapping[str, object] | None = None,  # noqa: A002
        **kwargs: Any,
    ) -> list[tuple[Document, float]]:
        """As :meth:`similarity_search`, each with its cosine in [-1, 1]."""
        _refuse_unknown(kwargs)
        hits = self._nearest(self._embedder.encode_query(query), k, filter)
        return [(to_document(hit.chunk), hit.score) for hit in hits]

    def similarity_search_by_vector(
        self,
        embedding: list[float],
        k: int = 4,
        filter: Mapping[str, object] | None = None,  # noqa: A002
        **kwargs: Any,
    ) -> list[Document]:
        """Documents nearest to a vector of any length above 0."""
        _refuse_unknown(kwargs)
        hits = self._nearest(self._as_query(embedding), k, filter)
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
        query, k, filter
            As for :meth:`similarity_search`.
        fetch_k
            Nearest documents to choose from; their texts are embedded for this.
        lambda_mult
            1 looks at nearness only, 0 at difference only.
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
        _refuse_unknown(kwargs)
        vector = self._as_query(embedding)
        hits = self._nearest(vector, max(k, fetch_k), filter)
        if not hits:
            return []
        candidates = self._embedder.encode_documents([hit.chunk.text for hit in hits])
        chosen = maximal_marginal_relevance(vector, list(candidates), lambda_mult=lambda_mult, k=k)
        return [to_document(hits[i].chunk) for i in chosen]

    def _nearest(
        self, vector: NDArray[np.float32], k: int, where: Mapping[str, object] | None
    ) -> list[SearchHit]:
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise RetrievalError(f"k is {k!r}; it must be a whole number, at least 1")
        index = self._index
        return [] if index is None else index.search_vector(vector, k=k, where=where)

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


def _as_source(chunk: Chunk) -> SourceDocument:
    return SourceDocument(
        id=chunk.document_id,
        text=chunk.text,
        title=chunk.title,
        path=chunk.path,
        metadata=chunk.metadata,
    )


def _check_length(name: str, values: Sequence[object] | None, count: int) -> None:
    if values is not None and len(values) != count:
        raise RetrievalError(f"{name} holds {len(values)} entries for {count} texts; give one each")


def _refuse_unknown(kwargs: Mapping[str, object]) -> None:
    if kwargs:
        raise RetrievalError(
            f"FaissVectorStore has no option {next(iter(kwargs))!r} here; search takes k and "
            "filter, adding takes ids"
        )
