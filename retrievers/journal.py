"""Embeddings finished by an ingest that has not committed yet, kept so that the next one resumes.

Shards are written to a temporary name and renamed to one that carries the digest of their bytes.
A shard that was torn anyway (power cut) does not match its name and is thrown away.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from retrievers.durable import make_folders, replace_file, storage_faults
from retrievers.row_files import KEY_BYTES

JOURNAL_NAME = "journal"
"""Folder of the journals in an index's work folder."""
PART_NAME = "new.part"

logger = logging.getLogger(__name__)


def text_key(text: str) -> bytes:
    """Name of a text in caches: 16 bytes of its SHA-256."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:KEY_BYTES]


def half_shards(journal: Path) -> list[Path]:
    """What killed processes were writing into the journals of a folder: it is of no use to the next."""
    return sorted(journal.glob(f"*/{PART_NAME}"))


class EmbeddingJournal:
    """Embeddings by text key, for one embedder.

    Parameters
    ----------
    folder : Path
        Folder of the journal; journals of other embedders may stand beside it.
    fingerprint : str
        The embedder.
    dim : int
        Length of the vectors.
    """

    def __init__(self, folder: Path, fingerprint: str, dim: int) -> None:
        self._folder = folder / fingerprint
        with _writing(self._folder):
            make_folders(self._folder)
        self._dtype = np.dtype([("key", f"V{KEY_BYTES}"), ("vector", "<f4", (dim,))])
        self._shards: list[Path] = []
        self._places: dict[bytes, tuple[int, int]] = {}
        with _writing(self._folder):
            for path in sorted(self._folder.iterdir()):
                self._take(path)

    def __len__(self) -> int:
        return len(self._places)

    def snapshot(self) -> frozenset[bytes]:
        """Keys held now; at construction, what an earlier run left."""
        return frozenset(self._places)

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def append(self, keys: Sequence[bytes], vectors: NDArray[np.float32]) -> None:
        """Keep a batch of embeddings on disk before anything else happens."""
        records = np.empty(len(keys), dtype=self._dtype)
        records["key"] = np.frombuffer(b"".join(keys), dtype=f"V{KEY_BYTES}")
        records["vector"] = vectors
        buffer = io.BytesIO()
        np.save(buffer, records, allow_pickle=False)
        content = buffer.getvalue()
        digest = hashlib.sha256(content).hexdigest()[:32]
        number = len(self._shards)
        path = self._folder / f"{number:06d}-{digest}.npy"
        with _writing(self._folder):
            replace_file(path, self._folder / PART_NAME, content)
        self._register(path, records["key"])

    def vectors(self, keys: Sequence[bytes]) -> NDArray[np.float32]:
        """Vectors of keys that the journal holds, ``(len(keys), dim)`` float32."""
        out = np.empty((len(keys), self._dtype["vector"].shape[0]), dtype=np.float32)
        wanted: dict[int, list[tuple[int, int]]] = {}
        for position, key in enumerate(keys):
            shard, row = self._places[key]
            wanted.setdefault(shard, []).append((position, row))
        for shard, pairs in wanted.items():
            records = np.load(self._shards[shard], mmap_mode="r", allow_pickle=False)
            positions, rows = zip(*pairs, strict=True)
            out[list(positions)] = records["vector"][list(rows)]
        return out

    def _take(self, path: Path) -> None:
        """Register a shard of an earlier run, or delete it where it is not whole."""
        content = path.read_bytes()
        name = f"-{hashlib.sha256(content).hexdigest()[:32]}.npy"
        if not path.name.endswith(name):
            if path.suffix == ".npy":
                logger.warning("discarding %s: it was cut off while being written", path)
            path.unlink()
            return
        records = np.load(io.BytesIO(content), allow_pickle=False)
        if records.dtype != self._dtype:
            path.unlink()
            return
        # Numbers run on even where an earlier shard was discarded.
        target = self._folder / f"{len(self._shards):06d}{name}"
        if target != path:
            path.rename(target)
        self._register(target, records["key"])

    def _register(self, path: Path, keys: NDArray[np.void]) -> None:
        number = len(self._shards)
        self._shards.append(path)
        for row, key in enumerate(keys):
            self._places[key.tobytes()] = (number, row)


def _writing(folder: Path) -> contextlib.AbstractContextManager[None]:
    return storage_faults(
        f"the ingest journal {folder} cannot be written", state="the index is as it was"
    )
