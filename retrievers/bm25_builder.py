"""BM25 in the format of bm25s, built in a stream: memory does not grow with the texts.

bm25s itself holds the token ids of the whole corpus as Python lists while it builds. Here they are
spilled to a forward index of (term, count) pairs first; it stays in the generation, so that the
next one tokenises only what is new. The arrays are the same as bm25s writes, and bm25s reads and
scores them.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retrievers.bm25 import (
    ANALYSIS_NAME,
    FORWARD_NAME,
    LENGTHS_NAME,
    ROWS_NAME,
    Bm25Index,
    map_file,
)
from retrievers.chunk_texts import runs
from retrievers.durable import create_file, make_folders, write_array, write_text
from retrievers.terms import ANALYSIS, text_terms

K1 = 1.5
B = 0.75
_METHOD = "lucene"
_BLOCK_ROWS = 4096
_VOCABULARY_NAME = "vocab.index.json"


class Bm25Builder:
    """Writes the BM25 files of a generation.

    Parameters
    ----------
    folder : Path
        New folder for the files.
    previous : Bm25Index, optional
        Vocabulary of the generation whose rows will be copied.

    Notes
    -----
    Scores follow Lucene's variant as bm25s has it, ``k1 = 1.5`` and ``b = 0.75``. In memory are
    the vocabulary and 12 bytes per row.
    """

    def __init__(self, folder: Path, previous: Bm25Index | None = None) -> None:
        make_folders(folder)
        self._folder = folder
        self._vocabulary = dict(previous.vocabulary) if previous is not None else {}
        self._columns = _unused_columns(self._vocabulary)
        self._file = create_file(folder / FORWARD_NAME)
        self._ends: list[NDArray[np.int64]] = [np.zeros(1, dtype=np.int64)]
        self._lengths: list[NDArray[np.int32]] = []
        self._num_pairs = 0

    def append(self, texts: Sequence[str]) -> None:
        """Tokenise and add the next rows."""
        ends, lengths, pairs = [], [], []
        for text in texts:
            words = text_terms(text)
            counts = Counter(words)
            for word, count in counts.items():
                column = self._vocabulary.get(word)
                if column is None:
                    column = self._vocabulary[word] = next(self._columns)
                pairs.append(column)
                pairs.append(count)
            self._num_pairs += len(counts)
            ends.append(self._num_pairs)
            lengths.append(len(words))
        self._file.write(np.array(pairs, dtype="<i4").tobytes())
        self._ends.append(np.array(ends, dtype=np.int64))
        self._lengths.append(np.array(lengths, dtype=np.int32))

    def copy(self, previous: Bm25Index, rows: NDArray[np.int64]) -> None:
        """Add rows of the previous generation, whose vocabulary this builder started from."""
        for start in range(0, len(rows), _BLOCK_ROWS):
            block = rows[start : start + _BLOCK_ROWS]
            for first, last in runs(block):
                pairs, ends = previous.forward(first, last)
                self._file.write(pairs.tobytes())
                self._ends.append(self._num_pairs + ends)
                self._num_pairs += len(pairs)
            self._lengths.append(previous.lengths[block].astype(np.int32))

    def finish(self) -> None:
        """Compute the scores and write every file."""
        self._file.close()
        ends = np.concatenate(self._ends)
        lengths = (
            np.concatenate(self._lengths) if self._lengths else np.empty(0, dtype=np.int32)
        ).astype("<i4")
        write_array(self._folder / LENGTHS_NAME, lengths)
        write_array(self._folder / ROWS_NAME, ends.astype("<u8"))
        analysis = json.dumps({"version": ANALYSIS})
        write_text(self._folder / ANALYSIS_NAME, analysis)
        params = {
            "k1": K1,
            "b": B,
            "delta": 0.5,
            "method": _METHOD,
            "idf_method": _METHOD,
            "dtype": "float32",
            "int_dtype": "int32",
            "num_docs": len(lengths),
            "backend": "numpy",
        }
        write_text(self._folder / "params.index.json", json.dumps(params))
        self._write_scores(ends, lengths)

    def abort(self) -> None:
        """Close without finishing."""
        with contextlib.suppress(OSError):  # closing writes what is buffered; nobody wants it
            self._file.close()

    def _write_scores(self, ends: NDArray[np.int64], lengths: NDArray[np.int32]) -> None:
        num_rows = len(lengths)
        num_terms = max(self._vocabulary.values(), default=-1) + 1
        path = self._folder / FORWARD_NAME
        pairs = map_file(path, "<i4", 2 * self._num_pairs).reshape(-1, 2)
        frequencies = np.zeros(num_terms, dtype=np.int64)
        blocks = [
            (first, min(first + _BLOCK_ROWS, num_rows)) for first in range(0, num_rows, _BLOCK_ROWS)
        ]
        for first, last in blocks:
            found = np.bincount(pairs[ends[first] : ends[last], 0], minlength=num_terms)
            frequencies += found
        # A word of deleted texts only is text that was deleted; its column is given to another word.
        left = {word: column for word, column in self._vocabulary.items() if frequencies[column]}
        vocabulary = json.dumps(left, ensure_ascii=True)
        write_text(self._folder / _VOCABULARY_NAME, vocabulary)
        idf = np.zeros(num_terms, dtype=np.float32)
        for column, df in enumerate(frequencies.tolist()):
            if df:
                idf[column] = math.log(1 + (num_rows - df + 0.5) / (df + 0.5))
        indptr = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(frequencies)])
        _save(self._folder / "indptr.csc.index.npy", indptr)
        data = _create(self._folder / "data.csc.index.npy", np.float32, self._num_pairs)
        indices = _create(self._folder / "indices.csc.index.npy", np.int32, self._num_pairs)
        cursor = indptr[:-1].copy()
        mean_length = float(lengths.mean()) if num_rows else 0.0
        for first, last in blocks:
            block = pairs[ends[first] : ends[last]]
            term, count = block[:, 0], block[:, 1].astype(np.float64)
            row = np.repeat(np.arange(first, last), np.diff(ends[first : last + 1]))
            norm = K1 * ((1 - B) + B * lengths[row] / mean_length) if mean_length else count
            score = idf[term] * (count / (norm + count))
            order = np.argsort(term, kind="stable")
            term_sorted = term[order]
            starts = np.searchsorted(term_sorted, term_sorted, side="left")
            position = cursor[term_sorted] + np.arange(len(order)) - starts
            data[position] = score[order]
            indices[position] = row[order]
            cursor += np.bincount(term, minlength=num_terms)
        for array in (data, indices):
            if isinstance(array, np.memmap):
                array.flush()


def _unused_columns(vocabulary: Mapping[str, int]) -> Iterator[int]:
    """Columns that no word has, lowest first."""
    used = set(vocabulary.values())
    return (column for column in itertools.count() if column not in used)


def _create(path: Path, dtype: type, count: int) -> NDArray[Any]:
    if not count:
        _save(path, np.empty(0, dtype=dtype))
        return np.empty(0, dtype=dtype)
    header = io.BytesIO()
    fields = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(header, fields)  # type: ignore[no-untyped-call]
    size = header.tell() + count * np.dtype(dtype).itemsize
    with create_file(path) as file:
        file.write(header.getvalue())
        file.flush()
        # The blocks are taken now: a page of a mapped file that finds no room on the disk later is
        # a bus error, which kills the process.
        os.posix_fallocate(file.fileno(), 0, size)
    created: NDArray[Any] = np.load(path, mmap_mode="r+", allow_pickle=False)
    return created


def _save(path: Path, values: NDArray[Any]) -> None:
    with create_file(path) as file:
        # Not `tofile` inside `np.save`, which says neither where nor why a write fell short.
        buffer = io.BytesIO()
        np.save(buffer, values, allow_pickle=False)
        file.write(buffer.getbuffer())
