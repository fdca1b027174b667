"""One generation of an index: its row files, labels, columns, BM25 and documents, for reading.

Labels rise with the row, so the row of a FAISS label is found by bisection, and a row that
survives into the next generation keeps its label.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from retrievers.bm25 import Bm25Index
from retrievers.bm25_builder import Bm25Builder
from retrievers.chunk_texts import id_hash
from retrievers.columns import Columns
from retrievers.documents import DocumentRecord, DocumentTable
from retrievers.errors import CorruptIndexError, RetrievalError
from retrievers.index_settings import indexed_text
from retrievers.manifest import Manifest
from retrievers.row_files import RowFiles, open_array

logger = logging.getLogger(__name__)

DENSE_NAME = "dense.faiss"
BM25_NAME = "bm25"
LABELS_NAME = "labels.i64"
IDS_NAME = "ids.u64"
_BLOCK_ROWS = 4096


class Generation(RowFiles):
    """One complete state of an index, opened for reading; all files are open from the start.

    Parameters
    ----------
    folder : Path
        Generation folder.
    manifest : Manifest
        Its manifest.

    Attributes
    ----------
    is_current : bool
        Whether the files on disk are as this version writes them; if not, they are made anew by the next ingest.
    id_hashes : ndarray
        ``(num_rows,)`` uint64, :func:`~retrievers.chunk_texts.id_hash` of every chunk id.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        rows = manifest.num_chunks
        super().__init__(folder, rows, manifest.dim)
        self.manifest = manifest
        self.columns = Columns(folder, rows)
        self.labels = open_array(folder / LABELS_NAME, "<i8", (rows,))
        self.id_hashes = open_array(folder / IDS_NAME, "<u8", (rows,))
        self._id_order: NDArray[np.int64] | None = None
        self._key_order: NDArray[np.int64] | None = None
        self._documents = DocumentTable(folder)
        self.bm25 = Bm25Index(folder / BM25_NAME, rows)
        self.is_current = self.bm25.is_current and self.columns.is_current
        if not self.bm25.is_current:
            self.bm25 = self._analysed_anew()

    def _analysed_anew(self) -> Bm25Index:
        """Build BM25 from the chunks: the terms on disk were made by the rules of another version."""
        logger.warning(
            "%s: its BM25 terms were made by an older version and are made anew at every start; "
            "ingest once to keep them",
            self.folder,
        )
        # The files are mapped, so they may go.
        with tempfile.TemporaryDirectory() as work:
            builder = Bm25Builder(Path(work) / BM25_NAME)
            for start in range(0, self.num_rows, _BLOCK_ROWS):
                block = range(start, min(start + _BLOCK_ROWS, self.num_rows))
                title = self.manifest.include_title
                builder.append([indexed_text(chunk, title) for chunk in self.chunks.chunks(block)])
            builder.finish()
            return Bm25Index(Path(work) / BM25_NAME, self.num_rows)

    def close(self) -> None:
        """Release what is not released by garbage collection."""
        self._documents.close()
        super().close()

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
            self._id_order = np.argsort(self.id_hashes, kind="stable")
        wanted = np.uint64(id_hash(chunk_id))
        first, last = (
            int(np.searchsorted(self.id_hashes, wanted, side=side, sorter=self._id_order))
            for side in ("left", "right")
        )
        for row in self._id_order[first:last]:
            if self.chunks.chunk(int(row)).id == chunk_id:
                return int(row)
        raise RetrievalError(f"the index holds no chunk {chunk_id!r}")

    def rows_of_keys(self, keys: Sequence[bytes]) -> NDArray[np.int64]:
        """Rows that hold the vectors of these texts, -1 for none."""
        rows = np.full(len(keys), -1, dtype=np.int64)
        if not self.num_rows or not keys:
            return rows
        # Void bytes have no order in NumPy; two big-endian halves do.
        stored = self.keys.view(">u8").reshape(-1, 2)
        wanted = np.frombuffer(b"".join(keys), dtype=">u8").reshape(-1, 2)
        if self._key_order is None:
            self._key_order = np.argsort(stored[:, 0], kind="stable")
        first = np.searchsorted(stored[:, 0], wanted[:, 0], side="left", sorter=self._key_order)
        for position, start in enumerate(first.tolist()):
            while start < self.num_rows:
                row = int(self._key_order[start])
                if stored[row, 0] != wanted[position, 0]:
                    break
                if stored[row, 1] == wanted[position, 1]:
                    rows[position] = row
                    break
                start += 1
        return rows

    def documents(self) -> Iterator[DocumentRecord]:
        """Every document, in the order of ingestion."""
        return iter(self._documents)

    def rows_of_documents(self, ids: set[str]) -> NDArray[np.bool_]:
        """``(num_rows,)`` bool: rows that belong to these documents."""
        if not self.num_rows:
            return np.zeros(0, dtype=np.bool_)
        values, codes = self.columns.column("document_id")
        table = np.array([value in ids for value in values], dtype=np.bool_)
        found: NDArray[np.bool_] = table[codes]
        return found
