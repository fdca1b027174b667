"""Metadata as dictionary-encoded columns, so that a filter looks at each distinct value once.

A field that most rows carry is stored as a code for every row, any other as pairs of row and code:
however many names of their own the documents have, files and memory grow with the values present.
"""

from __future__ import annotations

import contextlib
import json
from array import array
from bisect import bisect_left
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from retrievers.durable import close_unfinished, create_file, write_array, write_text
from retrievers.errors import CorruptIndexError
from retrievers.row_files import open_array
from retrievers.types import Chunk, Scalar

FIELDS = ("document_id", "title", "path")
"""Chunk fields that can be filtered on besides the metadata."""

_VALUES_NAME = "columns.json"
_CODES_NAME = "columns.i32"
_PAIRS_NAME = "columns.pairs.i32"
_SPILL_NAME = "columns.spill"
_RULES = 1
"""Version of what :func:`chunk_fields` makes of a chunk: columns of another are not copied, but made anew."""
_BLOCK = 1 << 16


def chunk_fields(chunk: Chunk) -> dict[str, Scalar]:
    """Everything of a chunk that a filter may select on.

    Metadata called like a field of the chunk, or like an operator of a filter, is selected on by
    ``metadata.NAME``.
    """
    fields: dict[str, Scalar] = {"document_id": chunk.document_id, "title": chunk.title}
    if chunk.path is not None:
        fields["path"] = chunk.path
    for name, value in chunk.metadata.items():
        taken = name.startswith("$") or name in FIELDS
        fields[f"metadata.{name}" if taken else name] = value
    return fields


class ColumnWriter:
    """Collects the columns of a new generation.

    Memory grows with the distinct values, and while writing by 8 bytes at most a value present.

    Parameters
    ----------
    folder : Path
        Folder of the generation.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._num_rows = 0
        self._columns: dict[str, int] = {}
        self._num_values: list[int] = []
        # One table for all columns: a dict for each of a million fields would weigh ten times as much.
        # The type is part of the key: True, 1 and 1.0 are one key to a dict.
        self._codes: dict[tuple[int, type, Scalar], int] = {}
        self._spill = create_file(folder / _SPILL_NAME)
        self._block_sizes: list[int] = []

    def append(self, rows: Sequence[Mapping[str, Scalar]]) -> None:
        """Add the fields of the next rows."""
        triples = array("i")
        for row, fields in enumerate(rows, self._num_rows):
            for name, value in fields.items():
                column, code = self._code(name, value)
                triples.extend((column, row, code))
        self._spill.write(triples.tobytes())
        self._block_sizes.append(len(triples) // 3)
        self._num_rows += len(rows)

    def copy(self, columns: Columns, rows: NDArray[np.int64]) -> None:
        """Add the fields of rows of another generation, in its order; a value is looked at once, however many have it."""
        new_rows = np.full(columns.num_rows, -1, dtype=np.int32)
        new_rows[rows] = np.arange(self._num_rows, self._num_rows + len(rows), dtype=np.int32)
        used = np.zeros(columns.num_values, dtype=np.bool_)
        for row, number in columns.present():
            used[number[new_rows[row] >= 0]] = True
        codes = np.empty((columns.num_values, 2), dtype=np.int32)
        for place, (name, value) in enumerate(columns.all_values()):
            if used[place]:
                codes[place] = self._code(name, value)
        for row, number in columns.present():
            stays = new_rows[row] >= 0
            column, code = codes[number[stays]].T
            triples = np.stack([column, new_rows[row[stays]], code], axis=1)
            self._spill.write(triples.tobytes())
            self._block_sizes.append(len(triples))
        self._num_rows += len(rows)

    def _code(self, name: str, value: Scalar) -> tuple[int, int]:
        """Number of a column, and of a value in it; both are made where they are new."""
        column = self._columns.setdefault(name, len(self._columns))
        if column == len(self._num_values):
            self._num_values.append(0)
        code = self._codes.setdefault((column, type(value), value), self._num_values[column])
        self._num_values[column] += code == self._num_values[column]
        return column, code

    def write(self) -> None:
        """Write the files of the columns."""
        self._spill.close()
        names = sorted(self._columns)
        places = np.empty(len(names), dtype=np.int64)
        places[[self._columns[name] for name in names]] = np.arange(len(names))
        counts = np.zeros(len(names), dtype=np.int64)
        for place, _, _ in self._blocks(places):
            counts += np.bincount(place, minlength=len(names))
        sparse = 2 * counts < self._num_rows
        sparse_rows = np.where(sparse, counts, 0)
        slots = np.cumsum(~sparse) - 1
        cursor = np.cumsum(sparse_rows) - sparse_rows
        codes = np.full((int((~sparse).sum()), self._num_rows), -1, dtype="<i4")
        pairs = np.empty((int(sparse_rows.sum()), 2), dtype="<i4")
        for place, row, code in self._blocks(places):
            dense = ~sparse[place]
            codes[slots[place[dense]], row[dense]] = code[dense]
            order = np.argsort(place, kind="stable")
            order = order[sparse[place[order]]]
            found = place[order]
            offset = np.arange(len(found)) - np.searchsorted(found, found, side="left")
            pairs[cursor[found] + offset] = np.stack([row[order], code[order]], axis=1)
            np.add.at(cursor, found, 1)
        with contextlib.suppress(OSError):  # left, it is a file of numbers that nothing reads
            (self._folder / _SPILL_NAME).unlink()
        write_array(self._folder / _CODES_NAME, codes)
        values: list[list[Scalar]] = [[] for _ in names]
        for column, _, value in self._codes:
            values[column].append(value)
        body = {
            "num_rows": self._num_rows,
            "rules": _RULES,
            "values": {name: values[self._columns[name]] for name in names},
        }
        if len(pairs):
            write_array(self._folder / _PAIRS_NAME, pairs)
            body["sparse_rows"] = sparse_rows.tolist()
        write_text(self._folder / _VALUES_NAME, json.dumps(body))

    def abort(self) -> None:
        """Close without finishing."""
        close_unfinished(self._spill)

    def _blocks(
        self, places: NDArray[np.int64]
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int32]]]:
        """Place of the column among the sorted names, row and code of every value."""
        with (self._folder / _SPILL_NAME).open("rb") as file:
            for size in self._block_sizes:
                block = np.frombuffer(file.read(12 * size), dtype=np.int32).reshape(-1, 3)
                yield places[block[:, 0]], block[:, 1].astype(np.int64), block[:, 2]


class Columns:
    """The columns of a generation, mapped from disk.

    Parameters
    ----------
    folder, num_rows : Path, int
        Generation folder, and the rows that its manifest promises.

    Attributes
    ----------
    is_current : bool
        Whether the fields were made of the chunks by the rules of :func:`chunk_fields` as they are now.
    num_values : int
        Distinct values of all columns together.
    """

    def __init__(self, folder: Path, num_rows: int) -> None:
        path = folder / _VALUES_NAME
        try:
            body = json.loads(path.read_text(encoding="utf-8"))
            self._values: dict[str, list[Scalar]] = body["values"]
            stored_rows = int(body["num_rows"])
            sparse_rows = np.array(body.get("sparse_rows") or [0] * len(self._values), np.int64)
            self.is_current = body.get("rules") == _RULES
        except (OSError, ValueError, KeyError, TypeError, OverflowError) as exc:
            raise CorruptIndexError(f"{path} cannot be read: {exc}") from exc
        if stored_rows != num_rows or sparse_rows.shape != (len(self._values),):
            raise CorruptIndexError(f"{path} does not hold {num_rows} rows; ingest again")
        self._names = sorted(self._values)
        self.num_values = sum(map(len, self._values.values()))
        self._num_rows = num_rows
        self._sparse_rows = sparse_rows
        dense = sparse_rows == 0
        # Place of a dense column, or of the first pair of another.
        self._places = np.where(dense, np.cumsum(dense) - 1, np.cumsum(sparse_rows) - sparse_rows)
        self._codes = open_array(folder / _CODES_NAME, "<i4", (int(dense.sum()), num_rows))
        num_pairs = int(sparse_rows.sum())
        self._pairs = (
            open_array(folder / _PAIRS_NAME, "<i4", (num_pairs, 2))
            if num_pairs
            else np.empty((0, 2), dtype="<i4")
        )

    @property
    def num_rows(self) -> int:
        """Rows every column has."""
        return self._num_rows

    def names(self) -> Collection[str]:
        """Fields that at least one row carries."""
        return self._values.keys()

    def column(self, name: str) -> tuple[Sequence[Scalar], NDArray[np.int32]]:
        """Distinct values, and for every row the number of its value or -1 for none."""
        number = bisect_left(self._names, name)
        place, count = int(self._places[number]), int(self._sparse_rows[number])
        if not count:
            return self._values[name], self._codes[place]
        codes = np.full(self._num_rows, -1, dtype=np.int32)
        pairs = self._pairs[place : place + count]
        codes[pairs[:, 0]] = pairs[:, 1]
        return self._values[name], codes

    def all_values(self) -> Iterator[tuple[str, Scalar]]:
        """Every value with its field, numbered through all columns by their order here."""
        for name in self._names:
            for value in self._values[name]:
                yield name, value

    def present(self) -> Iterator[tuple[NDArray[np.int32], NDArray[np.int64]]]:
        """Rows and the numbers of their values as :meth:`all_values` counts them; in pieces, the rows of a field in order."""
        counts = np.array([len(self._values[name]) for name in self._names], dtype=np.int64)
        firsts = np.cumsum(counts) - counts
        first_of_dense = firsts[self._sparse_rows == 0]
        step = max(1, _BLOCK // max(1, len(first_of_dense)))
        for start in range(0, self._num_rows if len(first_of_dense) else 0, step):
            codes = self._codes[:, start : start + step]
            field, row = np.nonzero(codes >= 0)
            yield (start + row).astype(np.int32), first_of_dense[field] + codes[field, row]
        of_pair = np.repeat(firsts, self._sparse_rows)
        for start in range(0, len(self._pairs), _BLOCK):
            pairs = self._pairs[start : start + _BLOCK]
            yield pairs[:, 0], of_pair[start : start + _BLOCK] + pairs[:, 1]
