"""A store on disk: one safetensors file per chunk, read layer by layer, and only what is, byte for byte, what was written.

What lies where in the folder is told in :mod:`chunk_cache.tiers.disk.layout`, what a chunk file holds in
:mod:`chunk_cache.tiers.encoding`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from chunk_cache.errors import ChunkCacheError, GoneRecordError
from chunk_cache.keys import ChunkKey, KVContext, TokenIds
from chunk_cache.records import ChunkKV, seen_ids
from chunk_cache.tiers.base import Tier
from chunk_cache.tiers.disk.budget import DISK_BYTES, FolderBudget
from chunk_cache.tiers.disk.layout import (
    check_manifest,
    check_place,
    chunk_path,
    context_path,
    make_folder,
    pin_path,
    write_context,
)
from chunk_cache.tiers.disk.listing import folders_of, list_folder, prune
from chunk_cache.tiers.disk.pins import read_pin, remove_pin, write_pin
from chunk_cache.tiers.disk.private_files import sync_folder
from chunk_cache.tiers.disk.reader import FileReader
from chunk_cache.tiers.encoding import (
    DamagedRecordError,
    EncodedRecord,
    RecordHeader,
    encode_record,
)

logger = logging.getLogger(__name__)


class StoreFolder(Tier):
    """Chunk records in a folder: the tier ``disk``.

    Several processes may read and write one folder: each file is replaced atomically and checks itself, so the worst
    race is a miss. What a process knows of the folder is an index in memory. It learns at once what it changes itself;
    of others' changes, a record that is asked for by key is found at once, and one that is gone turns out so when it
    is opened.

    **Damage.** A file of which any byte is not what was written is a miss. It is deleted when it is met, counted, and
    logged. It is not kept elsewhere: nobody could tell whose text it holds, so an erasure could not reach it. What the
    disk refuses to read is a miss, counted, and stays. A record of another release's codec or layout is a miss, and
    stays.

    **Room.** All files, temporary ones included, never weigh more than the budget, whoever writes. Room belongs to
    shares: one per tenant, model and rank. While there is room everybody takes it. Then whoever holds most loses its
    longest unused record; one that no waiting request needs, if there is any (:meth:`heed_queue`). So each of n shares
    that want it has 1/n of the budget, and no share can push another below that. A share that nobody used for a week is
    emptied first. Use is noted on the files' times, which survive a restart, and go on where the clock goes back.

    **Crashes.** A file is written under a temporary name and renamed. What a crash leaves is removed when the folder is
    opened by :meth:`connect`, and when room is made. A removed folder is made again by the next write.

    Parameters
    ----------
    path : str or PathLike
        The folder.
    create : bool
        Make it if it does not exist.
    byte_budget : int
        Most bytes of all chunk files and temporary files.
    model : str
        Folder of the model whose records are written here, told beside them.
    codec : str
        Codec of the records that are written; what is read tells its own.

    Raises
    ------
    ChunkCacheError
        If there is no such folder, it is not a chunk store, or one of another format version.

    Attributes
    ----------
    corrupt_files : int
        Damaged files met since the folder was opened, and deleted.
    failed_reads : int
        Times that the disk refused to read.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        create: bool = False,
        byte_budget: int = DISK_BYTES,
        model: str = "",
        codec: str = "plain",
    ) -> None:
        if byte_budget < 0:
            raise ChunkCacheError(f"byte_budget={byte_budget}: give a number of bytes from 0 on")
        self.path = Path(path)
        self.model = model
        """Folder of the model whose records are written here."""
        self.codec = codec
        self.budget = FolderBudget(self.path, byte_budget, self.describe)
        self.corrupt_files = 0
        self.failed_reads = 0
        self._told: set[str] = set()
        """Namespaces whose context says their tenant and model, as this process has seen."""
        if create:
            make_folder(self.path)
        check_manifest(self.path)

    # -- Tier ---------------------------------------------------------------------------------

    @classmethod
    def check_usable(cls, location: str) -> None:
        """Refuse what is no folder and cannot become one."""
        check_place(Path(location))

    @classmethod
    def connect(cls, location: str, *, byte_budget: int, model: str) -> Self:
        """Open or make a folder: it is listed, what crashes left goes, and what its budget has no room for.

        Other users lose their rights to it. A folder of an older format version is emptied.
        """
        folder = cls(location, create=True, byte_budget=byte_budget, model=model)
        folder.trim(byte_budget)
        prune(folder.path)
        return folder

    def contains(self, key: ChunkKey) -> bool:
        """Whether there is a file with anything in it."""
        return self.size_of(key) > 0

    def open(self, key: ChunkKey, token_ids: TokenIds) -> FileReader | None:
        """Open a record's file and read its header; see :class:`FileReader` for what happens to the file meanwhile."""
        reader = self._open(key)
        if reader is None or np.array_equal(reader.token_ids, token_ids):
            return reader
        reader.close()
        return None

    def read(self, key: ChunkKey) -> ChunkKV | None:
        """Read a record whatever its tokens are; ``None`` where the file is damaged or gone."""
        reader = self._open(key)
        if reader is None:
            return None
        try:
            return reader.record()
        except OSError:
            self.failed_reads += 1
        except ChunkCacheError:  # damage: counted where it was met
            pass
        finally:
            reader.close()
        return None

    def put(
        self, record: ChunkKV, *, context: KVContext | None = None, tenant: str | None = None
    ) -> bool:
        """Write a record's file, which is read back on the CPU; ``False`` where nothing unpinned can make room.

        Raises
        ------
        OSError
            If the disk refuses; no file of the final name is left behind half-written.
        ChunkCacheError
            If the record changed since it was sealed.
        """
        encoded = encode_record(record, self.codec)
        if not self.path.is_dir():
            make_folder(self.path)
        if context is not None:
            self._tell(context, tenant)
        try:
            return self._write(record.key, encoded)
        except FileNotFoundError:  # another process swept the file, or removed the folder
            make_folder(self.path)
            return self._write(record.key, encoded)

    def remove(self, key: ChunkKey) -> bool:
        """Delete a record's file and its pin; ``False`` if there was none."""
        self.unpin(key)
        return self.budget.remove(key)

    def keys(self) -> Iterator[ChunkKey]:
        """Keys of all files, by namespace and name; nothing is opened."""
        return iter(self.budget.index().keys())

    def keys_by_use(self) -> list[ChunkKey]:
        """Keys of all files, the longest unused first, as this process knows it."""
        return self.budget.index().keys_by_use()

    def note_context(self, context: KVContext) -> None:
        """Write ``context.json`` of a namespace."""
        write_context(self.path, context, self.model)
        self.budget.regroup(context.namespace)

    def size_of(self, key: ChunkKey) -> int:
        """Bytes of a record's file; 0 if there is none."""
        found = self.budget.find(key)
        return 0 if found is None else found.num_bytes

    # -- pins and eviction --------------------------------------------------------------------

    def pin(self, key: ChunkKey, *, ttl_s: float | None = None) -> bool:
        """Keep a record until :meth:`unpin`, or for `ttl_s`; ``False`` if it is not in the folder.

        The end is written down as a moment of the wall clock, so a restart changes nothing. A clock that is set shifts
        it for other processes only (:mod:`~chunk_cache.tiers.disk.pins`).
        """
        if not chunk_path(self.path, key).exists():
            return False
        until = math.inf if ttl_s is None else time.time() + ttl_s
        write_pin(pin_path(self.path, key), until)
        self.budget.note_pin(key, until)
        return True

    def unpin(self, key: ChunkKey) -> bool:
        """Make a record evictable again; ``False`` if it was not pinned."""
        was_pinned = self.is_pinned(key)
        if not remove_pin(pin_path(self.path, key)):
            return False
        self.budget.note_pin(key, 0.0)
        return was_pinned

    def pinned_until(self, key: ChunkKey) -> float:
        """When a record's pin ends, seconds since the epoch."""
        return read_pin(pin_path(self.path, key))

    def pins(self) -> dict[ChunkKey, float]:
        """Records that are pinned, and until when; nothing is opened."""
        return self.budget.index().pins()

    def evict(self, key: ChunkKey, *, force: bool = False) -> bool:
        """Delete one record by hand; ``False`` if it is absent, or pinned without ``force``."""
        return (force or not self.is_pinned(key)) and self.remove(key)

    def trim(self, byte_budget: int) -> list[ChunkKey]:
        """Delete records, of whoever holds most, until the files fit; pinned ones stay, and what crashes left goes.

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
        return self.budget.trim(byte_budget)

    def token_ids(self, key: ChunkKey) -> TokenIds | None:
        """Token ids of a record, without reading its KV; ``None`` where the file is damaged or gone, and it stays."""
        header = self._header_of(key)
        return None if header is None else header.token_ids

    def seen_ids(self, key: ChunkKey) -> TokenIds | None:
        """Token ids that a record's KV was computed from, as :meth:`token_ids`."""
        header = self._header_of(key)
        return None if header is None else seen_ids(header.side, header.token_ids)

    def _header_of(self, key: ChunkKey) -> RecordHeader | None:
        try:
            reader = FileReader(chunk_path(self.path, key), key)
        except (OSError, ChunkCacheError):
            return None
        reader.close()
        return reader.header

    def used(self, keys: Iterable[ChunkKey]) -> None:
        """Note that records were used just now: they are evicted last, and loaded first."""
        for key in keys:
            self.budget.used(key)

    def heed_queue(self, awaited: Callable[[], Sequence[ChunkKey]]) -> None:
        """Let the waiting queue say which records of a share are evicted last."""
        self.budget.awaited = awaited

    # -- order --------------------------------------------------------------------------------

    def sync(self) -> None:
        """Make deletions survive a power cut: what is erased must not come back."""
        for folder in (*folders_of(self.path), self.path):
            with contextlib.suppress(FileNotFoundError):
                sync_folder(folder)

    def sweep(self) -> int:
        """Remove what crashes left, and take the rights of other users to the folder; returns how many files."""
        return list_folder(self.path, tidy=True).swept

    def unfinished(self) -> tuple[int, int]:
        """Number and bytes of temporary files: being written, or left by a crash."""
        found = list_folder(self.path)
        return found.unfinished, found.unfinished_bytes

    def namespaces(self, fields: Mapping[str, Any]) -> frozenset[str]:
        """Namespaces that the folder describes with these fields of a :class:`KVContext`."""
        return frozenset(
            path.name
            for path in self.path.iterdir()
            if (found := self.describe(path.name)) is not None
            and all(found.get(name) == value for name, value in fields.items())
        )

    # -- inspecting ---------------------------------------------------------------------------

    def is_damaged(self, key: ChunkKey) -> bool:
        """Read a file for its checksums; one that the disk refuses to read is damaged too. It stays."""
        try:
            reader = FileReader(chunk_path(self.path, key), key)
        except (FileNotFoundError, GoneRecordError):
            return False
        except (OSError, DamagedRecordError):
            return True
        try:
            reader.check()
        except (FileNotFoundError, GoneRecordError):
            return False
        except (OSError, DamagedRecordError):
            return True
        finally:
            reader.close()
        return False

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
            self.budget.regroup(name)
        self._told.add(name)

    def _open(self, key: ChunkKey) -> FileReader | None:
        def damaged(number: int) -> None:
            self.corrupt_files += 1
            logger.warning("Chunk %s is damaged: its file in %s is deleted", key, self.path)
            self.budget.remove_damaged(key, number)

        try:
            reader = FileReader(chunk_path(self.path, key), key, damaged)
        except (FileNotFoundError, GoneRecordError):
            self.budget.forget(key)
            return None
        except OSError:
            self.failed_reads += 1
            return None
        except DamagedRecordError:
            return None
        if reader.header.can_decode:
            return reader
        reader.close()
        return None

    def _write(self, key: ChunkKey, encoded: EncodedRecord) -> bool:
        draft = self.budget.begin(key, encoded.num_bytes)
        if draft is None:
            return False
        try:
            draft.write(encoded.parts)
            self.budget.publish(key, draft)
        except BaseException:
            self.budget.discard(draft)
            raise
        return True
