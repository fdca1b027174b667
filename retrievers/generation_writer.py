"""Write the files of the next generation: the rows that stay are copied, the new ones follow."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from retrievers.bm25_builder import Bm25Builder
from retrievers.chunk_texts import ChunkTexts, id_hash
from retrievers.columns import ColumnWriter, chunk_fields
from retrievers.dense_update import DensePlan, write_dense
from retrievers.documents import DocumentRecord, write_documents
from retrievers.durable import write_array
from retrievers.errors import RetrievalError
from retrievers.generation import (
    BM25_NAME,
    DENSE_NAME,
    IDS_NAME,
    LABELS_NAME,
    Generation,
)
from retrievers.index_settings import IndexSettings, indexed_text
from retrievers.manifest import Manifest, record_files
from retrievers.row_files import RowFiles, RowWriter

_BLOCK_ROWS = 4096


def write_generation(
    folder: Path,
    *,
    settings: IndexSettings,
    plan: DensePlan,
    current: Generation | None,
    kept: NDArray[np.int64],
    staged: RowFiles,
    documents: Collection[DocumentRecord],
    progress: Callable[[int, int], None] | None = None,
) -> Manifest:
    """Fill the folder of a new generation.

    Parameters
    ----------
    folder : Path
        Empty folder; what is left in it after an error is of no use.
    settings, plan : IndexSettings, DensePlan
        Settings of the new state, and its FAISS index.
    current : Generation or None
        Generation to copy from, ``None`` for a new index.
    kept : ndarray
        Rows of it that stay.
    staged : RowFiles
        New rows.
    documents : collection of DocumentRecord
        Every document of the new state.
    progress : callable, optional
        Called with rows written and rows in total.

    Returns
    -------
    Manifest
        Of the new generation; writing it makes the generation the current one.

    Raises
    ------
    RetrievalError
        Where two chunks have one id, or the FAISS index cannot be built.
    """
    hashes = _write_rows(folder, settings.include_title, current, kept, staged, progress)
    first_label = current.manifest.next_label if current is not None else 0
    next_label = first_label + staged.num_rows
    labels = np.arange(first_label, next_label, dtype=np.int64)
    if current is not None:
        labels = np.concatenate([current.labels[kept], labels])
    write_array(folder / LABELS_NAME, labels.astype("<i8"))
    with closing(RowFiles(folder, len(labels), settings.dim)) as rows:
        _write_ids(folder, hashes, rows.chunks)
        num_trained = write_dense(
            folder / DENSE_NAME,
            plan,
            vectors=rows.vectors,
            labels=labels,
            current=current,
            kept=kept,
        )
    write_documents(folder, documents)
    return Manifest(
        generation=folder.name,
        embedder_name=settings.embedder_name,
        embedder_fingerprint=settings.embedder_fingerprint,
        dim=settings.dim,
        factory_requested=plan.requested,
        factory=plan.factory,
        search_options=plan.search_options,
        splitter=dict(settings.splitter),
        tokenizer_fingerprint=settings.tokenizer_fingerprint,
        include_title=settings.include_title,
        num_documents=len(documents),
        num_chunks=len(labels),
        num_trained=num_trained,
        next_label=next_label,
        files=record_files(folder),
    )


def _write_rows(
    folder: Path,
    include_title: bool,
    current: Generation | None,
    kept: NDArray[np.int64],
    staged: RowFiles,
    progress: Callable[[int, int], None] | None,
) -> NDArray[np.uint64]:
    """Write chunks, vectors, keys, columns and BM25; return the hash of every chunk id."""
    total = len(kept) + staged.num_rows
    rows = RowWriter(folder)
    columns = ColumnWriter(folder)
    bm25 = Bm25Builder(folder / BM25_NAME, current.bm25 if current is not None else None)
    hashes = [np.empty(0, dtype=np.uint64)]
    try:
        if current is not None:
            # Whatever can be is copied as it is: Python that looks at every row of a large index holds up
            # the searches of its process.
            bm25.copy(current.bm25, kept)
            hashes.append(current.id_hashes[kept])
            if current.columns.is_current:
                columns.copy(current.columns, kept)
            for block in _blocks(kept):
                rows.copy(current, block)
                if not current.columns.is_current:
                    columns.append([chunk_fields(chunk) for chunk in current.chunks.chunks(block)])
                if progress is not None:
                    progress(rows.num_rows, total)
        for block in _blocks(np.arange(staged.num_rows)):
            rows.copy(staged, block)
            chunks = list(staged.chunks.chunks(block))
            columns.append([chunk_fields(chunk) for chunk in chunks])
            bm25.append([indexed_text(chunk, include_title) for chunk in chunks])
            hashes.append(np.array([id_hash(chunk.id) for chunk in chunks], dtype=np.uint64))
            if progress is not None:
                progress(rows.num_rows, total)
        rows.finish()
        columns.write()
        bm25.finish()
    except BaseException:
        rows.abort()
        columns.abort()
        bm25.abort()
        raise
    return np.concatenate(hashes)


def _write_ids(folder: Path, hashes: NDArray[np.uint64], chunks: ChunkTexts) -> None:
    """Write the table from id to row; this is where an id that occurs twice shows."""
    write_array(folder / IDS_NAME, hashes.astype("<u8"))
    distinct, counts = np.unique(hashes, return_counts=True)
    if len(distinct) != len(hashes):
        row = int(np.flatnonzero(hashes == distinct[counts > 1][0])[-1])
        chunk = chunks.chunk(row)
        raise RetrievalError(
            f"chunk id {chunk.id!r} occurs twice, the second time in document "
            f"{chunk.document_id!r}; chunk ids must be distinct"
        )


def _blocks(rows: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    for start in range(0, len(rows), _BLOCK_ROWS):
        yield rows[start : start + _BLOCK_ROWS]
