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

from retrievers.chunk_texts import runs
from retrievers.dense import top_k
from retrievers.durable import create_file, make_folders, write_array, write_text
from retrievers.errors import CorruptIndexError, RetrievalError
from retrievers.terms import ANALYSIS, terms

K1 = 1.5
B = 0.75
_METHOD = "lucene"
MAX_QUERY_TERMS = 1000
"""Distinct terms of a query that are scored, the rarest; each costs a look at every row that has it."""

_BLOCK_ROWS = 4096
_FORWARD_NAME = "forward.i32"
_ROWS_NAME = "forward.rows.u64"
_LENGTHS_NAME = "lengths.i32"
_VOCABULARY_NAME = "vocab.index.json"
_ANALYSIS_NAME = "analysis.json"


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
        self._file = create_file(folder / _FORWARD_NAME)
        self._ends: list[NDArray[np.int64]] = [np.zeros(1, dtype=np.int64)]
        self._lengths: list[NDArray[np.int32]] = []
        self._num_pairs = 0

    def append(self, texts: Sequence[str]) -> None:
        """Tokenise and add the next rows."""
        ends, lengths, pairs = [], [], []
        for text in texts:
            words = terms(text)
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
        write_array(self._folder / _LENGTHS_NAME, lengths)
        write_array(self._folder / _ROWS_NAME, ends.astype("<u8"))
        analysis = json.dumps({"version": ANALYSIS})
        write_text(self._folder / _ANALYSIS_NAME, analysis)
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
        path = self._folder / _FORWARD_NAME
        pairs = _map(path, "<i4", 2 * self._num_pairs).reshape(-1, 2)
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


class Bm25Index:
    """The BM25 files of a generation, scored by bm25s and mapped from disk.

    Parameters
    ----------
    folder : Path
        Folder written by :class:`Bm25Builder`.
    num_rows : int
        Rows the manifest promises.

    Attributes
    ----------
    is_current : bool
        Whether the terms were made by the rules of :mod:`retrievers.terms` as they are now; else
        those of a query do not fit them.
    """

    def __init__(self, folder: Path, num_rows: int) -> None:
        # Imported here: it takes a second, and dense search alone does not need it.
        import bm25s

        try:
            self._bm25: Any = bm25s.BM25.load(
                folder, mmap=num_rows > 0, auto_compile=False, show_progress=False
            )
            self.lengths = np.fromfile(folder / _LENGTHS_NAME, dtype="<i4")
            self._rows = _map(folder / _ROWS_NAME, "<u8", num_rows + 1)
            self._pairs = _map(folder / _FORWARD_NAME, "<i4", 2 * int(self._rows[-1])).reshape(
                -1, 2
            )
        except (OSError, ValueError, KeyError, TypeError, EOFError) as exc:
            raise CorruptIndexError(f"{folder} is not a readable BM25 index; ingest again") from exc
        if len(self.lengths) != num_rows or self._bm25.scores["num_docs"] != num_rows:
            raise CorruptIndexError(f"{folder} does not hold {num_rows} rows; ingest again")
        self._num_rows = num_rows
        self.is_current = _analysis(folder) == ANALYSIS

    @property
    def vocabulary(self) -> dict[str, int]:
        """Term to column."""
        vocabulary: dict[str, int] = self._bm25.vocab_dict
        return vocabulary

    def forward(self, first: int, last: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Terms and counts, ``(pairs, 2)`` int32, of rows ``first:last``, and where those of each row end."""
        offsets = self._rows[first : last + 1].astype(np.int64)
        return self._pairs[offsets[0] : offsets[-1]], offsets[1:] - offsets[0]

    def search(
        self, query: str, k: int, *, mask: NDArray[np.bool_] | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Best rows that share a term with the query.

        Parameters
        ----------
        query : str
            Text; terms the corpus lacks are ignored, and of very many all but the rarest
            :data:`MAX_QUERY_TERMS`.
        k : int
            Results at most.
        mask : ndarray, optional
            ``(num_rows,)`` bool, rows that may be returned.

        Returns
        -------
        rows, scores
            Best first, ties by row; fewer than `k` where fewer rows share a term.
        """
        if k < 1:
            raise RetrievalError(f"k must be at least 1, got {k}")
        counts = Counter(word for word in terms(query) if word in self.vocabulary)
        if not counts or not self._num_rows:
            return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32)
        scores = self._scores({self.vocabulary[word]: count for word, count in counts.items()})
        if mask is not None:
            scores *= mask
        best = top_k(scores, k)
        best = best[scores[best] > 0]
        return best, scores[best]

    def _scores(self, counts: dict[int, int]) -> NDArray[np.float32]:
        """Score every row for columns and how often the query has them.

        As bm25s does, which reads the rows of a word anew each time the query repeats it.
        """
        data, indices, indptr = (self._bm25.scores[name] for name in ("data", "indices", "indptr"))
        columns = np.array(list(counts), dtype=np.int64)
        starts, ends = indptr[columns], indptr[columns + 1]
        # In the order of the query: sums of floats depend on it.
        chosen = np.sort(np.argsort(ends - starts, kind="stable")[:MAX_QUERY_TERMS])
        scores = np.zeros(self._num_rows, dtype=np.float32)
        for column, start, end in zip(columns[chosen], starts[chosen], ends[chosen], strict=True):
            # A row stands once in a column, so that none is added to twice here.
            scores[indices[start:end]] += data[start:end] * np.float32(counts[int(column)])
        return scores


def _analysis(folder: Path) -> int:
    """Rules that made the terms; the first indexes do not say."""
    path = folder / _ANALYSIS_NAME
    try:
        return int(json.loads(path.read_text(encoding="utf-8"))["version"]) if path.exists() else 1
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise CorruptIndexError(f"{path} cannot be read ({exc}); ingest again") from exc


def _unused_columns(vocabulary: Mapping[str, int]) -> Iterator[int]:
    """Columns that no word has, lowest first."""
    used = set(vocabulary.values())
    return (column for column in itertools.count() if column not in used)


def _map(path: Path, dtype: str, count: int) -> NDArray[Any]:
    if path.stat().st_size != count * np.dtype(dtype).itemsize:
        raise CorruptIndexError(f"{path} has {path.stat().st_size} bytes; ingest again")
    # An empty file cannot be mapped.
    return np.memmap(path, dtype=dtype, mode="r") if count else np.empty(0, dtype=dtype)


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
