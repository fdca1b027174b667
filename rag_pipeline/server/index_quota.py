"""How many chunks an index may hold, file by file of an upload."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable

from rag_pipeline.server.file_names import file_of
from retrievers import DocumentRecord


class IndexQuota:
    """Room for the files of one upload: each makes room for its next version, whatever else the index holds.

    Parameters
    ----------
    limit : int
        Chunks in the index.
    records : iterable of DocumentRecord
        Documents that it has.
    names : collection of str
        Files of the upload.
    """

    def __init__(
        self, limit: int, records: Iterable[DocumentRecord], names: Collection[str]
    ) -> None:
        self._limit = limit
        self._held: Counter[str] = Counter()
        self._others = 0
        for record in records:
            name = file_of(record.id)
            if name is not None and name in names:
                self._held[name] += record.num_chunks
            else:
                self._others += record.num_chunks

    def room_for(self, name: str) -> int:
        """Most chunks that a file may bring now; never fewer than the index has of it."""
        mine = self._held[name]
        return max(mine, self._limit - self._others - self._held.total() + mine)

    def replace(self, name: str) -> None:
        """Forget what the index had of a file that was read."""
        self._held.pop(name, None)

    def add(self, chunks: int) -> None:
        """Count what a file has brought."""
        self._others += chunks
