"""A store on disk: one safetensors file per chunk, read back only if every byte is what was written.

What lies where in the folder is told in :mod:`chunk_cache.tiers.disk.layout`, what a chunk file holds in
:mod:`chunk_cache.tiers.disk.chunk_file`. A file that is damaged in any way is a miss: counted, never an error and
never wrong KV.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from chunk_cache.errors import ChunkCacheError
from chunk_cache.keys import ChunkKey, KVContext, TokenIds
from chunk_cache.records import ChunkKV
from chunk_cache.tiers.base import Tier
from chunk_cache.tiers.disk.budget import (
    DISK_BYTES,
    FolderBudget,
    stored_files,
    temporary_bytes,
)
from chunk_cache.tiers.disk.chunk_file import decode_record, encode_record, read_token_ids
from chunk_cache.tiers.disk.layout import (
    check_manifest,
    chunk_path,
    chunks_in,
    context_path,
    make_folder,
    pin_path,
    write_context,
)
from chunk_cache.tiers.disk.private_files import (
    sweep,
    sync_folder,
    temporary_files,
    tighten,
    write_private,
)


class StoreFolder(Tier):
    """Chunk records in a folder: the tier ``disk``.

    Several processes may read and write one folder: each file is replaced atomically and checks
    itself, so the worst race is a miss.

    Parameters
    ----------
    path : str or PathLike
        The folder.
    create : bool
        Make it if it does not exist.
    byte_budget : int
        Most bytes of all chunk files; a write makes room by deleting the longest unused ones.
    model : str
        Folder of the model whose records are written here, told beside them.

    Raises
    ------
    ChunkCacheError
        If there is no such folder, it is not a chunk store, or one of another format version.

    Attributes
    ----------
    corrupt_files : int
        Damaged files met since the folder was opened.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        create: bool = False,
        byte_budget: int = DISK_BYTES,
        model: str = "",
    ) -> None:
        if byte_budget < 0:
            raise ChunkCacheError(f"byte_budget={byte_budget}: give a number of bytes from 0 on")
        self.path = Path(path)
        self.model = model
        """Folder of the model whose records are written here."""
        self.budget = FolderBudget(self.path, byte_budget, self.evict)
        self.corrupt_files = 0
        self._told: set[str] = set()
        """Namespaces whose context says their tenant and model, as this process has seen."""
        if create:
            make_folder(self.path)
        check_manifest(self.path)

    # -- Tier ---------------------------------------------------------------------------------

    @classmethod
    def connect(cls, location: str, *, byte_budget: int, model: str) -> Self:
        """Open or make a folder; what crashes left goes, and other users lose their rights to it."""
        folder = cls(location, create=True, byte_budget=byte_budget, model=model)
        folder.clean()
        return folder

    def contains(self, key: ChunkKey) -> bool:
        """Whether there is a file with anything in it."""
        return self.size_of(key) > 0

    def put(
        self, record: ChunkKV, *, context: KVContext | None = None, tenant: str | None = None
    ) -> bool:
        """Write a record's file, which is read back on the CPU; ``False`` where nothing unpinned can make room.

        Raises
        ------
        OSError
            If the disk refuses; no file of the final name is left behind half-written.
        """
        data = encode_record(record)
        if self.budget.make_room(len(data)) is None:
            return False
        if context is not None:
            self._tell(context, tenant)
        write_private(chunk_path(self.path, record.key), data)
        return True

    def remove(self, key: ChunkKey) -> bool:
        """Delete a record's file and its pin; ``False`` if there was none."""
        self.unpin(key)
        try:
            chunk_path(self.path, key).unlink()
        except FileNotFoundError:
            return False
        return True

    def keys(self) -> Iterator[ChunkKey]:
        """Keys of all files, by namespace and name; nothing is opened."""
        return chunks_in(self.path)

    def keys_by_use(self) -> list[ChunkKey]:
        """Keys of all files, the longest unused first."""
        return [file.key for file in stored_files(self.path)]

    def note_context(self, context: KVContext) -> None:
        """Write ``context.json`` of a namespace."""
        write_context(self.path, context, self.model)

    def size_of(self, key: ChunkKey) -> int:
        """Bytes of a record's file; 0 if there is none."""
        try:
            return chunk_path(self.path, key).stat().st_size
        except OSError:
            return 0

    # -- pins and eviction --------------------------------------------------------------------

    def pin(self, key: ChunkKey) -> bool:
        """Keep a record until :meth:`unpin`; ``False`` if it is not in the folder.

        Engines load it as pinned, at their next start.
        """
        if not chunk_path(self.path, key).exists():
            return False
        write_private(pin_path(self.path, key), b"")
        return True

    def unpin(self, key: ChunkKey) -> bool:
        """Make a record evictable again; ``False`` if it was not pinned."""
        try:
            pin_path(self.path, key).unlink()
        except FileNotFoundError:
            return False
        return True

    def is_pinned(self, key: ChunkKey) -> bool:
        """Whether a record is pinned."""
        return pin_path(self.path, key).exists()

    def evict(self, key: ChunkKey, *, force: bool = False) -> bool:
        """Delete one record by hand; ``False`` if it is absent, or pinned without ``force``."""
        return (force or not self.is_pinned(key)) and self.remove(key)

    def trim(self, byte_budget: int) -> list[ChunkKey]:
        """Delete records, the longest unused first, until the files fit; pinned ones stay.

        Parameters
        ----------
        byte_budget : int
            Most bytes of all chunk files together. Pinned ones alone may weigh more.

        Returns
        -------
        list[ChunkKey]
            What was deleted.

        Raises
        ------
        ChunkCacheError
            If the budget is negative.
        """
        if byte_budget < 0:
            raise ChunkCacheError(f"byte_budget={byte_budget}: give a number of bytes from 0 on")
        self.sweep()
        return self.budget.trim(byte_budget)

    def token_ids(self, key: ChunkKey) -> TokenIds | None:
        """Token ids of a record, without reading its KV; ``None`` where the file is damaged or gone."""
        return read_token_ids(chunk_path(self.path, key))

    def used(self, keys: Iterable[ChunkKey]) -> None:
        """Note that records were used just now: they are evicted last, and loaded first."""
        for key in keys:
            with contextlib.suppress(OSError):
                os.utime(chunk_path(self.path, key))

    # -- order --------------------------------------------------------------------------------

    def clean(self) -> None:
        """Remove what crashes left, and take the rights of other users to the folder."""
        self.sweep()
        tighten(self.path)

    def sync(self) -> None:
        """Make deletions survive a power cut: what is erased must not come back."""
        for folder in (*self.path.glob("*/*/"), *self.path.glob("*/"), self.path):
            with contextlib.suppress(FileNotFoundError):
                sync_folder(folder)

    def sweep(self) -> int:
        """Remove temporary files that no process writes any more; returns how many."""
        return sweep(self.path)

    def unfinished(self) -> tuple[int, int]:
        """Number and bytes of temporary files: being written, or left by a crash."""
        return sum(1 for _ in temporary_files(self.path)), temporary_bytes(self.path)

    def namespaces(self, fields: Mapping[str, Any]) -> frozenset[str]:
        """Namespaces that the folder describes with these fields of a :class:`KVContext`."""
        return frozenset(
            path.name
            for path in self.path.iterdir()
            if (found := self.describe(path.name)) is not None
            and all(found.get(name) == value for name, value in fields.items())
        )

    # -- inspecting ---------------------------------------------------------------------------

    def verify(self, *, remove: bool = False) -> list[ChunkKey]:
        """Read every file and return the keys of damaged ones, deleting them if ``remove``.

        What crashes left goes with them.
        """
        bad = [key for key in self.keys() if self.read(key) is None]
        if remove:
            self.sweep()
            for key in bad:
                self.remove(key)
        return bad

    def describe(self, namespace: str) -> dict[str, Any] | None:
        """Fields of ``context.json`` of a namespace, or ``None`` if there is none to read."""
        try:
            found = json.loads(context_path(self.path, namespace).read_bytes())
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def _tell(self, context: KVContext, tenant: str | None) -> None:
        """Write a namespace's context where it is not there, or says another tenant or model."""
        name = context.namespace
        if name in self._told and context_path(self.path, name).exists():
            return
        told = self.describe(name) or {}
        mark = told.get("tenant") if tenant is None else tenant
        if (told.get("tenant"), told.get("model")) != (mark, self.model) or not told:
            write_context(self.path, context, self.model, tenant=tenant)
        self._told.add(name)

    def read(self, key: ChunkKey) -> ChunkKV | None:
        """Read a record whatever its tokens are; ``None`` where the file is damaged or gone."""
        try:
            # Read whole, not mapped: a file cut short under a map would kill the process.
            data = chunk_path(self.path, key).read_bytes()
        except FileNotFoundError:
            return None
        except OSError:
            self.corrupt_files += 1
            return None
        record = decode_record(key, data)
        self.corrupt_files += record is None
        return record
