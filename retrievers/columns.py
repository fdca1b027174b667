"""Metadata as dictionary-encoded columns, so that a filter looks at each distinct value once."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from retrievers.errors import CorruptIndexError
from retrievers.types import Chunk, Scalar

FIELDS = ("document_id", "title", "path")
"""Chunk fields that can be filtered on besides the metadata."""

_VALUES_NAME = "columns.json"
_CODES_NAME = "columns.i32"


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

    Memory grows with the distinct values, and by 4 bytes a row and field.
    """

    def __init__(self) -> None:
        self._num_rows = 0
        self._codes: dict[str, list[NDArray[np.int32]]] = {}
        self._values: dict[str, dict[tuple[type, Scalar], int]] = {}
        self._rows_seen: dict[str, int] = {}

    def append(self, rows: Sequence[Mapping[str, Scalar]]) -> None:
        """Add the fields of the next rows."""
        names = {name for row in rows for name in row}
        for name in names:
            table = self._values.setdefault(name, {})
            codes = np.full(len(rows), -1, dtype=np.int32)
            for position, row in enumerate(rows):
                if name in row:
                    value = row[name]
                    # The type is part of the key: True, 1 and 1.0 are one key to a dict.
                    codes[position] = table.setdefault((type(value), value), len(table))
            parts = self._codes.setdefault(name, [])
            missing = self._num_rows - self._rows_seen.get(name, 0)
            if missing:
                parts.append(np.full(missing, -1, dtype=np.int32))
            parts.append(codes)
            self._rows_seen[name] = self._num_rows + len(rows)
        self._num_rows += len(rows)

    def write(self, folder: Path) -> None:
        """Write both files of the columns into `folder`."""
        names = sorted(self._values)
        with (folder / _CODES_NAME).open("wb") as file:
            for name in names:
                parts = self._codes[name]
                missing = self._num_rows - self._rows_seen[name]
                for part in [*parts, np.full(missing, -1, dtype=np.int32)]:
                    file.write(part.astype("<i4").tobytes())
        values = {name: [value for _, value in self._values[name]] for name in names}
        text = json.dumps({"num_rows": self._num_rows, "values": values})
        (folder / _VALUES_NAME).write_text(text, encoding="utf-8")


class Columns:
    """The columns of a generation, mapped from disk.

    Parameters
    ----------
    folder
        Generation folder.
    num_rows
        Rows the manifest promises.
    """

    def __init__(self, folder: Path, num_rows: int) -> None:
        try:
            body = json.loads((folder / _VALUES_NAME).read_text(encoding="utf-8"))
            self._values: dict[str, list[Scalar]] = body["values"]
            stored_rows = int(body["num_rows"])
        except (OSError, ValueError, KeyError, TypeError) as exc:
            raise CorruptIndexError(f"{folder / _VALUES_NAME} cannot be read: {exc}") from exc
        self._names = sorted(self._values)
        expected = len(self._names) * num_rows
        path = folder / _CODES_NAME
        if stored_rows != num_rows or path.stat().st_size != 4 * expected:
            raise CorruptIndexError(f"{path} does not hold {num_rows} rows; ingest again")
        self._num_rows = num_rows
        self._codes = (
            np.memmap(path, dtype="<i4", mode="r").reshape(len(self._names), num_rows)
            if expected
            else np.empty((len(self._names), 0), dtype="<i4")
        )

    @property
    def num_rows(self) -> int:
        """Rows every column has."""
        return self._num_rows

    def names(self) -> Sequence[str]:
        """Fields that at least one row carries."""
        return self._names

    def column(self, name: str) -> tuple[Sequence[Scalar], NDArray[np.int32]]:
        """Distinct values, and for every row the number of its value or -1 for none."""
        return self._values[name], self._codes[self._names.index(name)]
