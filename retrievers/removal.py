"""What left an index: the chunks of the state before that the new one no longer holds.

Text lives on elsewhere in what was computed from it, chunk KV above all. Whoever keeps such things
passes a function that erases them; it is called when the new state is safe on the disk and before the
files of the old one go. A process that is killed in between leaves those files, and the next change
of the index, or :func:`retrievers.finish_removals`, calls the function again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from retrievers.chunk_texts import ChunkTexts
from retrievers.errors import CorruptIndexError
from retrievers.generation import Generation
from retrievers.row_files import KEY_BYTES, KEYS_NAME, open_array
from retrievers.types import Chunk

_BLOCK_ROWS = 4096
_LIKE = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Removal:
    """Chunks that an index no longer holds, and a way to look up those that it does.

    Parameters
    ----------
    old : Path
        Folder of the state before.
    rows : ndarray or None
        Rows of it that may be gone; ``None`` for all.
    live : Generation
        The new state.
    """

    old: Path
    rows: NDArray[np.int64] | None
    live: Generation

    @property
    def num_rows(self) -> int:
        """Chunks that may be gone."""
        return self._num_old_rows() if self.rows is None else len(self.rows)

    def _num_old_rows(self) -> int:
        try:
            return (self.old / KEYS_NAME).stat().st_size // KEY_BYTES
        except OSError:
            return 0  # half removed: it was erased before its files began to go

    def chunks(self) -> Iterator[Chunk]:
        """Every chunk that is gone; one whose title and text a live document has too is not."""
        keys_path, num_rows = self.old / KEYS_NAME, self._num_old_rows()
        if not num_rows:
            return
        try:
            store = ChunkTexts(self.old, num_rows)
        except CorruptIndexError:
            return
        with closing(store):
            keys = open_array(keys_path, f"V{KEY_BYTES}", (num_rows,))
            rows = np.arange(num_rows) if self.rows is None else self.rows
            for start in range(0, len(rows), _BLOCK_ROWS):
                block = rows[start : start + _BLOCK_ROWS]
                found = self.live.rows_of_keys([keys[row].tobytes() for row in block])
                yield from store.chunks(block[found < 0])

    def live_like(self, text: str) -> list[Chunk]:
        """Live chunks that share the most terms with a text: where it occurs again, it is there."""
        rows, _ = self.live.bm25.search(text, _LIKE)
        return list(self.live.chunks.chunks(rows))


Erase = Callable[[Removal], None]
"""Erases elsewhere what was made of the chunks of a :class:`Removal`."""
