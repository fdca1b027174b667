"""BM25 of a generation, in the format of bm25s, which reads and scores it; :mod:`.bm25_builder` writes it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retrievers.dense import top_k
from retrievers.errors import CorruptIndexError, RetrievalError
from retrievers.terms import ANALYSIS, text_terms

MAX_QUERY_TERMS = 1000
"""Distinct terms of a query that are scored, the rarest; each costs a look at every row that has it."""

FORWARD_NAME = "forward.i32"
ROWS_NAME = "forward.rows.u64"
LENGTHS_NAME = "lengths.i32"
ANALYSIS_NAME = "analysis.json"


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
            self.lengths = np.fromfile(folder / LENGTHS_NAME, dtype="<i4")
            self._rows = map_file(folder / ROWS_NAME, "<u8", num_rows + 1)
            self._pairs = map_file(folder / FORWARD_NAME, "<i4", 2 * int(self._rows[-1])).reshape(
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
        counts = Counter(word for word in text_terms(query) if word in self.vocabulary)
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
    path = folder / ANALYSIS_NAME
    try:
        return int(json.loads(path.read_text(encoding="utf-8"))["version"]) if path.exists() else 1
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise CorruptIndexError(f"{path} cannot be read ({exc}); ingest again") from exc


def map_file(path: Path, dtype: str, count: int) -> NDArray[Any]:
    """Map `count` numbers of a file that holds these and nothing else."""
    if path.stat().st_size != count * np.dtype(dtype).itemsize:
        raise CorruptIndexError(f"{path} has {path.stat().st_size} bytes; ingest again")
    # An empty file cannot be mapped.
    return np.memmap(path, dtype=dtype, mode="r") if count else np.empty(0, dtype=dtype)
