"""Chunk records as JSON lines with an offset table: any row is read without the others."""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from retrievers.durable import close_unfinished, create_file, write_array
from retrievers.errors import CorruptIndexError
from retrievers.types import Chunk

_RECORDS_NAME = "chunks.jsonl"
_OFFSETS_NAME = "chunks.u64"


def encode_chunk(chunk: Chunk) -> bytes:
    """One line of ``chunks.jsonl``."""
    record = {
        "id": chunk.id,
        "document_id": chunk.document_id,
        "text": chunk.text,
        "title": chunk.title,
        "start": chunk.start,
        "end": chunk.end,
        "num_tokens": chunk.num_tokens,
        "path": chunk.path,
        "metadata": dict(chunk.metadata),
    }
    # ASCII escapes keep lone surrogates, which some PDF extractors emit, and line separators.
    return json.dumps(record, separators=(",", ":")).encode() + b"\n"


def runs(rows: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """First row and the one behind the last of every stretch of rows that follow one another."""
    if len(rows):
        breaks = np.flatnonzero(np.diff(rows) != 1) + 1
        firsts = rows[np.concatenate([[0], breaks])]
        lasts = rows[np.concatenate([breaks - 1, [len(rows) - 1]])] + 1
        yield from zip(firsts.tolist(), lasts.tolist(), strict=True)


def id_hash(chunk_id: str) -> int:
    """Eight bytes of SHA-256, the key of the table from id to row."""
    return int.from_bytes(hashlib.sha256(chunk_id.encode("utf-8", "surrogatepass")).digest()[:8])


class ChunkTextWriter:
    """Appends records to a new store; only the offsets (8 bytes per row) stay in memory."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file = create_file(folder / _RECORDS_NAME)
        self._offsets = [np.zeros(1, dtype="<u8")]
        self._position = 0

    def append(self, lines: Iterable[bytes]) -> None:
        """Add encoded records."""
        ends = []
        for line in lines:
            self._file.write(line)
            self._position += len(line)
            ends.append(self._position)
        self._offsets.append(np.array(ends, dtype="<u8"))

    def copy(self, source: ChunkTexts, rows: NDArray[np.int64]) -> None:
        """Add records of another store; rows that follow one another are copied as one piece."""
        for first, last in runs(rows):
            piece, ends = source.piece(first, last)
            self._file.write(piece)
            self._offsets.append((self._position + ends).astype("<u8"))
            self._position += len(piece)

    def close(self) -> None:
        """Write the offsets and close."""
        self._file.close()
        write_array(self._folder / _OFFSETS_NAME, np.concatenate(self._offsets))

    def abort(self) -> None:
        """Close without finishing."""
        close_unfinished(self._file)


class ChunkTexts:
    """Random access to the chunks of a generation; the text stays on disk.

    Parameters
    ----------
    folder : Path
        Generation folder.
    num_rows : int
        Rows the manifest promises.
    """

    def __init__(self, folder: Path, num_rows: int) -> None:
        self._path = folder / _RECORDS_NAME
        offsets_path = folder / _OFFSETS_NAME
        try:
            if offsets_path.stat().st_size != 8 * (num_rows + 1):
                raise CorruptIndexError(f"{offsets_path} does not hold {num_rows} rows")
            self._offsets = np.memmap(offsets_path, dtype="<u8", mode="r")
            size = self._path.stat().st_size
            if int(self._offsets[-1]) != size:
                raise CorruptIndexError(f"{self._path} does not end where its offsets say")
            self._file = self._path.open("rb")
            self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ) if size else None
        except OSError as exc:
            raise CorruptIndexError(f"{self._path} cannot be read: {exc}") from exc
        self._num_rows = num_rows

    def __len__(self) -> int:
        return self._num_rows

    def line(self, row: int) -> bytes:
        """Read the encoded record of a row."""
        if self._map is None or not 0 <= row < self._num_rows:
            raise IndexError(f"row {row} of {self._num_rows}")
        return self._map[int(self._offsets[row]) : int(self._offsets[row + 1])]

    def piece(self, first: int, last: int) -> tuple[bytes, NDArray[np.int64]]:
        """Read the encoded records of rows ``first:last``, and where each ends in what was read."""
        if self._map is None or not 0 <= first < last <= self._num_rows:
            raise IndexError(f"rows {first} to {last} of {self._num_rows}")
        offsets = self._offsets[first : last + 1].astype(np.int64)
        return self._map[int(offsets[0]) : int(offsets[-1])], offsets[1:] - offsets[0]

    def chunk(self, row: int) -> Chunk:
        """Read the chunk of a row."""
        try:
            return Chunk(**json.loads(self.line(row)))
        except (ValueError, TypeError) as exc:
            raise CorruptIndexError(f"{self._path} row {row} is not a chunk: {exc}") from exc

    def chunks(self, rows: Iterable[int] | NDArray[np.int64]) -> Iterator[Chunk]:
        """Chunks of several rows, read one at a time."""
        return (self.chunk(int(row)) for row in rows)

    def close(self) -> None:
        """Release the mapping."""
        if self._map is not None:
            self._map.close()
        self._file.close()
