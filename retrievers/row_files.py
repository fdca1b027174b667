"""Chunk, vector and text key of every row: the files that a generation and staged rows share.

Row ``i`` of every file belongs to the same chunk.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retrievers.chunk_texts import ChunkTexts, ChunkTextWriter
from retrievers.durable import create_file
from retrievers.errors import CorruptIndexError

VECTORS_NAME = "vectors.f32"
KEYS_NAME = "keys.v16"
KEY_BYTES = 16


class RowFiles:
    """Rows on disk, opened for reading; vectors and keys are mapped.

    Parameters
    ----------
    folder : Path
        Folder written by :class:`RowWriter`.
    num_rows : int
        Rows it should hold.
    dim : int
        Length of the vectors.

    Attributes
    ----------
    chunks : ChunkStore
        Chunk of every row.
    vectors : ndarray
        ``(num_rows, dim)`` float32.
    keys : ndarray
        ``(num_rows,)`` of :data:`KEY_BYTES` bytes, the text each vector was made of.
    """

    def __init__(self, folder: Path, num_rows: int, dim: int) -> None:
        self.folder = folder
        self.num_rows = num_rows
        self.chunks = ChunkTexts(folder, num_rows)
        self.vectors = open_array(folder / VECTORS_NAME, "<f4", (num_rows, dim))
        self.keys = open_array(folder / KEYS_NAME, f"V{KEY_BYTES}", (num_rows,))

    def close(self) -> None:
        """Release what is not released by garbage collection."""
        self.chunks.close()


class RowWriter:
    """Appends rows to new files in `folder`; almost nothing of them stays in memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.num_rows = 0
        self._chunks = ChunkTextWriter(folder)
        self._vectors = create_file(folder / VECTORS_NAME)
        self._keys = create_file(folder / KEYS_NAME)

    def copy(self, source: RowFiles, rows: NDArray[np.int64]) -> None:
        """Add rows of other files; a few thousand at once, so that little of them is in memory."""
        self._chunks.copy(source.chunks, rows)
        self._vectors.write(np.ascontiguousarray(source.vectors[rows], dtype="<f4").tobytes())
        self._keys.write(source.keys[rows].tobytes())
        self.num_rows += len(rows)

    def append(self, lines: Iterable[bytes], vectors: NDArray[np.float32], keys: bytes) -> None:
        """Add rows.

        Parameters
        ----------
        lines : iterable of bytes
            Encoded chunks (:func:`retrievers.chunk_texts.encode_chunk`).
        vectors : ndarray
            ``(rows, dim)`` float32.
        keys : bytes
            :data:`KEY_BYTES` bytes per row.
        """
        self._chunks.append(lines)
        self._vectors.write(np.ascontiguousarray(vectors, dtype="<f4").tobytes())
        self._keys.write(keys)
        self.num_rows += len(vectors)

    def finish(self) -> None:
        """Complete the files."""
        self._chunks.close()
        self._vectors.close()
        self._keys.close()

    def abort(self) -> None:
        """Close without finishing."""
        self._chunks.abort()
        for file in (self._vectors, self._keys):
            with contextlib.suppress(OSError):  # closing writes what is buffered; nobody wants it
                file.close()


def open_array(path: Path, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """Map a file of fixed-size rows, refusing one that does not hold exactly `shape`."""
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
