"""A store on disk: one safetensors file per chunk, read back only if every byte is what was written.

Layout of the folder::

    store.json                                       format name and version
    <namespace>/context.json                         what the namespace stands for (no tenant salt)
    <namespace>/<2 hex>/<digest>-<tokens>.safetensors

A chunk file holds ``k``, ``v``, ``token_ids`` and, in its header, layout, base position and a
checksum over all of it. Files appear whole under their final name (``os.replace``) or not at all. A
file that is damaged in any way is a miss: counted, never an error and never wrong KV.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from chunk_cache.errors import ChunkCacheError
from chunk_cache.handles import ChunkState
from chunk_cache.keys import STORE_FORMAT_VERSION, ChunkKey, KVContext, TokenIds, as_token_ids
from chunk_cache.memory_store import MemoryStore
from chunk_cache.records import ChunkKV, KVLayout

_FORMAT = "rag-chunk-store"
_FILE_NAME = re.compile(r"([0-9a-f]{64})-([1-9][0-9]*)\.safetensors")
_NAMESPACE = re.compile(r"[0-9a-f]{32}")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LoadReport:
    """What became of every file of an import."""

    loaded: int = 0
    already_there: int = 0
    no_room: int = 0
    """The budget has no room without evicting: an import never pushes out what is in memory."""
    corrupt: int = 0

    def to_json(self) -> dict[str, int]:
        """Return all fields as a dict."""
        return dataclasses.asdict(self)


class StoreFolder:
    """Chunk records in a folder; implements :class:`chunk_cache.Tier`.

    Several processes may read and write one folder: each file is replaced atomically and checks
    itself, so the worst race is a miss.

    Parameters
    ----------
    path
        The folder.
    create
        Make it if it does not exist.

    Raises
    ------
    ChunkCacheError
        If there is no such folder, it is not a chunk store, or one of another format version.

    Attributes
    ----------
    corrupt_files
        Damaged files met since the folder was opened.
    """

    def __init__(self, path: str | os.PathLike[str], *, create: bool = False) -> None:
        self.path = Path(path)
        self.corrupt_files = 0
        manifest = self.path / "store.json"
        if create and not manifest.exists():
            if self.path.is_dir() and any(self.path.iterdir()):
                raise ChunkCacheError(
                    f"{self.path} is neither empty nor a chunk store: give another folder"
                )
            self.path.mkdir(parents=True, exist_ok=True)
            fields = {"format": _FORMAT, "version": STORE_FORMAT_VERSION}
            _write_atomically(manifest, json.dumps(fields).encode())
        try:
            found = json.loads(manifest.read_bytes())
            kind, version = found["format"], found["version"]
        except FileNotFoundError:
            raise ChunkCacheError(
                f"{self.path} is not a chunk store (no store.json): export one there first"
            ) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ChunkCacheError(f"{manifest} cannot be read ({error}): export again") from None
        if kind != _FORMAT or version != STORE_FORMAT_VERSION:
            raise ChunkCacheError(
                f"{manifest} says {kind!r} version {version!r}: this release reads {_FORMAT!r} "
                f"version {STORE_FORMAT_VERSION}; export again"
            )

    # -- Tier ---------------------------------------------------------------------------------

    def get(self, key: ChunkKey, token_ids: TokenIds) -> ChunkKV | None:
        """Read a record, or ``None`` when it is absent, damaged, or of other token ids."""
        record = self._read(key)
        return record if record is not None and record.tokens_equal(token_ids) else None

    def put(self, record: ChunkKV) -> bool:
        """Write a record (any device; read back on the CPU), replacing an older file of its key.

        Raises
        ------
        OSError
            If the disk refuses; no file of the final name is left behind half-written.
        """
        sealed = record if record.checksum is not None else record.sealed()
        header = {
            "format": _FORMAT,
            "layout": record.layout.value,
            "base_position": str(record.base_position),
            "checksum": str(sealed.checksum),
        }
        tensors = {
            "k": record.k.cpu(),
            "v": record.v.cpu(),
            "token_ids": torch.tensor(record.token_ids),
        }
        _write_atomically(self._file(record.key), save_safetensors(tensors, metadata=header))
        return True

    def remove(self, key: ChunkKey) -> bool:
        """Delete a record's file; ``False`` if there was none."""
        try:
            self._file(key).unlink()
        except FileNotFoundError:
            return False
        return True

    def keys(self) -> Iterator[ChunkKey]:
        """Keys of all files, by namespace and name; nothing is opened."""
        for folder in sorted(self.path.iterdir()):
            if not _NAMESPACE.fullmatch(folder.name):
                continue
            for file in sorted(folder.glob("*/*.safetensors")):
                parts = _FILE_NAME.fullmatch(file.name)
                if parts is not None:
                    yield ChunkKey(folder.name, parts[1], int(parts[2]))

    def size_of(self, key: ChunkKey) -> int:
        """Bytes of a record's file; 0 if there is none."""
        try:
            return self._file(key).stat().st_size
        except OSError:
            return 0

    # -- whole stores -------------------------------------------------------------------------

    def export(
        self,
        store: MemoryStore,
        *,
        keys: Iterable[ChunkKey] | None = None,
        contexts: Iterable[KVContext] = (),
        progress: Callable[[int], None] | None = None,
    ) -> int:
        """Write records of a memory store; files that are there already are kept as they are.

        Parameters
        ----------
        store
            Where from.
        keys
            Which; by default all that are READY.
        contexts
            Contexts to describe beside their chunks, for people and listings.
        progress
            Called with the number of chunks done so far.

        Returns
        -------
        int
            Number of files written.
        """
        for context in contexts:
            fields = {k: v for k, v in context.to_json().items() if k != "tenant"}
            _write_atomically(
                self.path / context.namespace / "context.json",
                json.dumps(fields, indent=1, sort_keys=True).encode(),
            )
        written = 0
        for done, key in enumerate(store.keys() if keys is None else keys, start=1):
            if not self._file(key).exists():
                with store.borrow(key) as record:
                    if record is not None:
                        written += self.put(record)
            if progress is not None:
                progress(done)
        return written

    def load_into(
        self,
        store: MemoryStore,
        *,
        namespace: str | None = None,
        pin: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> LoadReport:
        """Read records into a memory store until its budget is full; nothing is evicted for it.

        Parameters
        ----------
        store
            Where to.
        namespace
            Only chunks of this :attr:`KVContext.namespace`; by default all.
        pin
            Pin what is loaded.
        progress
            Called with the number of files done so far.
        """
        counts = dict.fromkeys((field.name for field in dataclasses.fields(LoadReport)), 0)
        wanted = (key for key in self.keys() if namespace in (None, key.namespace))
        for done, key in enumerate(wanted, start=1):
            if store.state(key) in (ChunkState.READY, ChunkState.BUILDING):
                counts["already_there"] += 1
            elif self._file(key).stat().st_size > store.free_bytes:
                counts["no_room"] += 1
            else:
                record = self._read(key)
                if record is None:
                    counts["corrupt"] += 1
                    store.count_corrupt()
                else:
                    counts["loaded" if store.put(record, pin=pin) else "no_room"] += 1
            if progress is not None:
                progress(done)
        return LoadReport(**counts)

    def verify(self, *, remove: bool = False) -> list[ChunkKey]:
        """Read every file and return the keys of damaged ones, deleting them if ``remove``."""
        bad = [key for key in self.keys() if self._read(key) is None]
        if remove:
            for key in bad:
                self.remove(key)
        return bad

    def describe(self, namespace: str) -> dict[str, Any] | None:
        """Fields of ``context.json`` of a namespace, or ``None`` if there is none to read."""
        try:
            found = json.loads((self.path / namespace / "context.json").read_bytes())
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def _file(self, key: ChunkKey) -> Path:
        name = f"{key.digest}-{key.num_tokens}.safetensors"
        return self.path / key.namespace / key.digest[:2] / name

    def _read(self, key: ChunkKey) -> ChunkKV | None:
        try:
            # Read whole, not mapped: a file cut short under a map would kill the process.
            data = self._file(key).read_bytes()
        except FileNotFoundError:
            return None
        except OSError:
            self.corrupt_files += 1
            return None
        try:
            header_size = int.from_bytes(data[:8], "little")
            header = json.loads(data[8 : 8 + header_size])["__metadata__"]
            tensors = load_safetensors(data)
            record = ChunkKV(
                key=key,
                token_ids=as_token_ids(tensors["token_ids"].numpy()),
                base_position=int(header["base_position"]),
                k=tensors["k"],
                v=tensors["v"],
                layout=KVLayout(header["layout"]),
                checksum=header["checksum"],
            )
            if record.verify():
                return record
        except Exception:
            # Deliberately wide: whatever a damaged file makes the parsers raise, it is a miss.
            pass
        self.corrupt_files += 1
        return None


def _write_atomically(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not fsynced: after a power cut a short file fails its checksum and is a miss.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
