"""An index on disk, opened for search."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Self

from retrievers.dense import DenseIndex, exact_search
from retrievers.documents import DocumentRecord
from retrievers.errors import CorruptIndexError, EmbedderMismatchError, RetrievalError
from retrievers.filters import Filter
from retrievers.generation import DENSE_NAME, Generation
from retrievers.hybrid import HybridRetriever
from retrievers.manifest import Manifest
from retrievers.row_files import VECTORS_NAME
from retrievers.types import Chunk, Retriever, SearchHit

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from retrievers.text_embedder import TextEmbedder

MODES = ("dense", "bm25", "hybrid")
EXACT_FILTER_ROWS = 4096
"""Filters that leave this few rows are answered by comparing them all: exact, and faster."""
# Only read by filters and the next ingest, and as large as everything else together.
_UNCHECKED = frozenset({VECTORS_NAME})


class Index:
    """An index folder, read-only; made by :meth:`open`.

    A concurrent ingest does not disturb it: it keeps searching the state that it opened.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        generation: Generation,
        dense: DenseIndex,
        embedder: TextEmbedder | None,
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self._generation = generation
        self._dense = dense
        self._embedder = embedder

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        embedder: TextEmbedder | None = None,
        verify: bool = True,
        mmap: bool = True,
        gpu: bool = True,
        search_options: str | None = None,
    ) -> Index:
        """Open the current state of an index.

        Parameters
        ----------
        folder : str or Path
            Index folder.
        embedder : TextEmbedder, optional
            Model for queries; must be the one the index was built with. Without it only BM25
            and search by vector work.
        verify : bool
            Read every file and compare checksums; else sizes only.
        mmap : bool
            Map the FAISS file instead of reading it into memory.
        gpu : bool
            Search on the GPU where faiss-gpu sees one.
        search_options : str, optional
            FAISS parameter string such as ``"nprobe=64"``; the manifest's by default.

        Raises
        ------
        EmbedderMismatchError
            With another embedder than the index was built with.
        CorruptIndexError
            For missing, cut off or altered files.
        RetrievalError
            Where `folder` holds no index.
        """
        root = Path(folder)
        manifest = Manifest.read(root)
        while True:
            try:
                generation, dense = _load(root, manifest, verify, mmap, gpu, search_options)
                break
            except (CorruptIndexError, FileNotFoundError) as exc:
                # An ingest may have replaced the generation between the two reads.
                newer = Manifest.read(root)
                if newer.generation == manifest.generation:
                    if isinstance(exc, CorruptIndexError):
                        raise
                    raise CorruptIndexError(f"{exc.filename} is missing; ingest again") from exc
                manifest = newer
        if embedder is not None:
            check_embedder(root, manifest, embedder.name, embedder.fingerprint)
        return cls(root, manifest, generation, dense, embedder)

    def __len__(self) -> int:
        return self.manifest.num_chunks

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the files."""
        self._generation.close()

    def chunk(self, chunk_id: str) -> Chunk:
        """Read the chunk with this id, or raise a :class:`RetrievalError`."""
        return self._generation.chunks.chunk(self._generation.row_of_id(chunk_id))

    def chunks(self) -> Iterator[Chunk]:
        """Every chunk, read one at a time."""
        return self._generation.chunks.chunks(range(len(self)))

    def documents(self) -> Iterator[DocumentRecord]:
        """Every document with its content hash and number of chunks."""
        return self._generation.documents()

    def verify(self) -> None:
        """Read every file and compare checksums; raises :class:`CorruptIndexError`."""
        self.manifest.check_files(self.folder, contents=True, skip=frozenset())

    def retriever(
        self,
        mode: str = "hybrid",
        *,
        k0: int = 60,
        depth: int = 50,
    ) -> Retriever:
        """Make a retriever over this index.

        Parameters
        ----------
        mode : str
            ``"dense"``, ``"bm25"`` or ``"hybrid"`` (both, by reciprocal rank fusion).
        k0, depth : int
            Of :class:`HybridRetriever`; other modes do not use them.
        """
        if mode not in MODES:
            raise RetrievalError(f"retrieval mode {mode!r} is not one of {', '.join(MODES)}")
        if mode == "bm25":
            return Bm25Retriever(self)
        if self._embedder is None:
            raise RetrievalError(f"retrieval mode {mode!r} needs the index opened with an embedder")
        dense = DenseRetriever(self, self._embedder)
        if mode == "dense":
            return dense
        return HybridRetriever([dense, Bm25Retriever(self)], k0=k0, depth=depth)

    def search_vector(
        self, vector: NDArray[np.float32], *, k: int, where: Mapping[str, object] | None = None
    ) -> list[SearchHit]:
        """Chunks nearest to a vector.

        Parameters
        ----------
        vector : ndarray
            ``(dim,)`` float32, unit length.
        k : int
            Results at most.
        where : mapping, optional
            Filter, see :mod:`retrievers.filters`.

        Returns
        -------
        list of SearchHit
            Best first; the score is the cosine (approximate with compressed factories).
        """
        import numpy as np

        _check_k(k)
        generation = self._generation
        if where is None:
            if not len(self):
                return []
            labels, scores = self._dense.search(vector[None], min(k, len(self)))
            found = labels[0] >= 0
            return self._hits(generation.rows_of_labels(labels[0][found]), scores[0][found])
        allowed = np.flatnonzero(Filter(where).mask(generation.columns))
        if len(allowed) > EXACT_FILTER_ROWS and self._dense.can_filter:
            labels, scores = self._dense.search(vector[None], k, allowed=generation.labels[allowed])
            found = labels[0] >= 0
            if found.sum() == k:
                return self._hits(generation.rows_of_labels(labels[0][found]), scores[0][found])
        rows, exact = exact_search(generation.vectors, allowed, vector, k)
        return self._hits(rows, exact)

    def search_terms(
        self, query: str, *, k: int, where: Mapping[str, object] | None = None
    ) -> list[SearchHit]:
        """Chunks by BM25, best first; only chunks that share a term with the query."""
        _check_k(k)
        generation = self._generation
        mask = None if where is None else Filter(where).mask(generation.columns)
        return self._hits(*generation.bm25.search(query, k, mask=mask))

    def _hits(self, rows: NDArray[np.int64], scores: NDArray[np.float32]) -> list[SearchHit]:
        chunks = self._generation.chunks.chunks(rows)
        return [
            SearchHit(chunk=chunk, score=float(score))
            for chunk, score in zip(chunks, scores, strict=True)
        ]


class DenseRetriever:
    """Ranks the chunks of an index by the cosine of query and chunk embedding."""

    def __init__(self, index: Index, embedder: TextEmbedder) -> None:
        self._index = index
        self._embedder = embedder

    def search(
        self, query: str, *, k: int, where: Mapping[str, object] | None = None
    ) -> list[SearchHit]:
        """Return at most `k` hits, best first."""
        return self._index.search_vector(self._embedder.encode_query(query), k=k, where=where)


class Bm25Retriever:
    """Ranks the chunks of an index by BM25; needs no embedder."""

    def __init__(self, index: Index) -> None:
        self._index = index

    def search(
        self, query: str, *, k: int, where: Mapping[str, object] | None = None
    ) -> list[SearchHit]:
        """Return at most `k` hits, best first; only chunks that share a term with the query."""
        return self._index.search_terms(query, k=k, where=where)


def check_embedder(folder: Path, manifest: Manifest, name: str, fingerprint: str) -> None:
    """Refuse vectors of another model; their scores against this index would mean nothing."""
    if fingerprint != manifest.embedder_fingerprint:
        raise EmbedderMismatchError(
            f"{folder} was built with embedder {manifest.embedder_name} "
            f"({manifest.embedder_fingerprint[:12]}), not {name} ({fingerprint[:12]}); "
            "use that embedder, or ingest into a new folder"
        )


def _load(
    root: Path, manifest: Manifest, verify: bool, mmap: bool, gpu: bool, options: str | None
) -> tuple[Generation, DenseIndex]:
    manifest.check_files(root, contents=verify, skip=_UNCHECKED)
    folder = root / manifest.generation
    generation = Generation(folder, manifest)
    dense = DenseIndex.load(
        folder / DENSE_NAME,
        manifest.factory,
        mmap=mmap,
        options=manifest.search_options if options is None else options,
        gpu=gpu,
    )
    if len(dense) != manifest.num_chunks or dense.dim != manifest.dim:
        raise CorruptIndexError(
            f"{folder / DENSE_NAME} holds {len(dense)} vectors of {dense.dim} dimensions, "
            f"{manifest.num_chunks} of {manifest.dim} expected; ingest again"
        )
    return generation, dense


def _check_k(k: int) -> None:
    if k < 1:
        raise RetrievalError(f"k must be at least 1, got {k}")
