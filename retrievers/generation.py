"""The row files of one generation: chunks, vectors, labels, text keys, columns, BM25.

Row ``i`` of every file belongs to the same chunk. Labels rise with the row, so the row of a FAISS
label is found by bisection, and a row that survives into the next generation keeps its label.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retrievers.bm25 import Bm25Index
from retrievers.chunk_store import ChunkStore, id_hash
from retrievers.columns import Columns
from retrievers.errors import CorruptIndexError, RetrievalError
from retrievers.manifest import Manifest

DENSE_NAME = "dense.faiss"
BM25_NAME = "bm25"
VECTORS_NAME = "vectors.f32"
LABELS_NAME = "labels.i64"
IDS_NAME = "ids.u64"
KEYS_NAME = "keys.v16"
DOCUMENTS_NAME = "documents.jsonl"
KEY_BYTES = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentRecord:
    """What a generation remembers of a document: enough to see that it is unchanged."""

    id: str
    content_hash: str
    num_chunks: int


class Generation:
    """One complete state of an index, opened for reading; all files are open from the start.

    Parameters
    ----------
    folder
        Generation folder.
    manifest
        Its manifest.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        rows = manifest.num_chunks
        self.folder = folder
        self.num_rows = rows
        self.chunks = ChunkStore(folder, rows)
        self.columns = Columns(folder, rows)
        self.vectors = _open(folder / VECTORS_NAME, "<f4", (rows, manifest.dim))
        self.labels = _open(folder / LABELS_NAME, "<i8", (rows,))
        self.keys = _open(folder / KEYS_NAME, f"V{KEY_BYTES}", (rows,))
        self._id_hashes = _open(folder / IDS_NAME, "<u8", (rows,))
        self._id_order: NDArray[np.int64] | None = None
        self.bm25 = Bm25Index(folder / BM25_NAME, rows)

    def rows_of_labels(self, labels: NDArray[np.int64]) -> NDArray[np.int64]:
        """Rows of FAISS labels.

        Raises
        ------
        CorruptIndexError
            For a label that no row has.
        """
        rows = np.searchsorted(self.labels, labels)
        inside = rows < self.num_rows
        if not inside.all() or not np.array_equal(self.labels[rows], labels):
            raise CorruptIndexError(
                f"{self.folder / DENSE_NAME} names chunks that {LABELS_NAME} lacks; ingest again"
            )
        return rows

    def row_of_id(self, chunk_id: str) -> int:
        """Row of a chunk id.

        Raises
        ------
        RetrievalError
            For an id the index does not hold.
        """
        if self._id_order is None:
            self._id_order = np.argsort(self._id_hashes, kind="stable")
        wanted = np.uint64(id_hash(chunk_id))
        first, last = (
            int(np.searchsorted(self._id_hashes, wanted, side=side, sorter=self._id_order))
            for side in ("left", "right")
        )
        for row in self._id_order[first:last]:
            if self.chunks.chunk(int(row)).id == chunk_id:
                return int(row)
        raise RetrievalError(f"the index holds no chunk {chunk_id!r}")

    def documents(self) -> Iterator[DocumentRecord]:
        """Every document, in the order of ingestion."""
        path = self.folder / DOCUMENTS_NAME
        try:
            with path.open("rb") as file:
                for line in file:
                    yield DocumentRecord(**json.loads(line))
        except (OSError, ValueError, TypeError) as exc:
            raise CorruptIndexError(f"{path} cannot be read ({exc}); ingest again") from exc

    def rows_of_documents(self, ids: set[str]) -> NDArray[np.bool_]:
        """``(num_rows,)`` bool: rows that belong to these documents."""
        if not self.num_rows:
            return np.zeros(0, dtype=np.bool_)
        values, codes = self.columns.column("document_id")
        table = np.array([value in ids for value in values], dtype=np.bool_)
        found: NDArray[np.bool_] = table[codes]
        return found

    def close(self) -> None:
        """Release what is not released by garbage collection."""
        self.chunks.close()


def _open(path: Path, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
    count = int(np.prod(shape))
    try:
        size = path.stat().st_size
    except OSError:
        raise CorruptIndexError(f"{path} is missing; ingest again") from None
    if size != count * np.dtype(dtype).itemsize:
        raise CorruptIndexError(f"{path} does not hold {shape[0]} rows; ingest again")
    if not count:
        return np.empty(shape, dtype=dtype)  # an empty file cannot be mapped
    return np.memmap(path, dtype=dtype, mode="r", shape=shape)
