"""The documents of a generation: a line each, in a file that is open from the start."""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

from retrievers.durable import create_file
from retrievers.errors import CorruptIndexError
from retrievers.manifest import MANIFEST_NAME, Manifest

_NAME = "documents.jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentRecord:
    """What a generation remembers of a document: enough to see that it is unchanged."""

    id: str
    content_hash: str
    num_chunks: int


_FIELDS = tuple(field.name for field in fields(DocumentRecord))


def write_documents(folder: Path, documents: Iterable[DocumentRecord]) -> None:
    """Write the table into the folder of a new generation."""
    with create_file(folder / _NAME) as file:
        # Field by field: `asdict` copies each value and takes twice as long as the rest.
        file.writelines(
            json.dumps({name: getattr(record, name) for name in _FIELDS}).encode("ascii") + b"\n"
            for record in documents
        )


def document_records(folder: str | Path) -> Iterator[DocumentRecord]:
    """Read the documents of an index without opening the rest of it; none where the folder holds no index.

    Whoever asks holds the index's lock, or may be told of a generation that is being replaced.

    Raises
    ------
    CorruptIndexError
        For files that cannot be read.
    """
    place = Path(folder)
    if not (place / MANIFEST_NAME).exists():
        return
    table = DocumentTable(place / Manifest.read(place).generation)
    try:
        yield from table
    finally:
        table.close()


def chunk_count(folder: str | Path) -> int:
    """Chunks of an index, without opening it; 0 where the folder holds none.

    Raises
    ------
    RetrievalError
        For a manifest that cannot be read.
    """
    place = Path(folder)
    return Manifest.read(place).num_chunks if (place / MANIFEST_NAME).exists() else 0


class DocumentTable:
    """Documents of one generation, in the order of ingestion.

    The file is opened here and never again by its path: by then a newer generation may have
    replaced the folder.

    Parameters
    ----------
    folder : Path
        Generation folder.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / _NAME
        try:
            with self._path.open("rb") as file:
                size = self._path.stat().st_size
                self._map = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) if size else b""
        except OSError as exc:
            raise CorruptIndexError(f"{self._path} cannot be read: {exc}") from exc

    def __iter__(self) -> Iterator[DocumentRecord]:
        start = 0
        # The end of a line is looked up each time: several readers share the map.
        while (end := self._map.find(b"\n", start)) >= 0:
            try:
                yield DocumentRecord(**json.loads(self._map[start:end]))
            except (ValueError, TypeError) as exc:
                raise CorruptIndexError(
                    f"{self._path} cannot be read ({exc}); ingest again"
                ) from exc
            start = end + 1

    def close(self) -> None:
        """Release the mapping."""
        if isinstance(self._map, mmap.mmap):
            self._map.close()
