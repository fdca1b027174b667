"""Which records a storage backend of SGLang may be asked for: a folder with one small file per record.

SGLang's storage interface can neither list nor, for most backends, delete. So the header of each record lies here,
and a record without one does not exist, whatever the backend still holds: it is erased the moment its header is gone.

::

    <namespace>/context.json                        what the namespace stands for (no tenant's salt)
    <namespace>/<2 hex>/<digest>-<tokens>.header    the header of a record, and the label of its pages
    groups/<group>/<namespace>-<digest>-<tokens>    an empty file per record of a conversation
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from chunk_cache import (
    ChunkKey,
    RecordHeader,
    make_private,
    read_description,
    read_header,
    sync_folder,
    write_private,
)

_NAME = re.compile(r"([0-9a-f]{64})-([1-9][0-9]*)\.header")
_NAMESPACE = re.compile(r"[0-9a-f]{32}")
_MEMBER = re.compile(r"([0-9a-f]{32})-([0-9a-f]{64})-([1-9][0-9]*)")
_MOST_MEMBERS = 256
"""Of one group, the newest."""
_MOST_GROUPS = 16_384
"""Those that were noted last; nobody says when a conversation is over."""


class Entry(NamedTuple):
    """One record, as the catalog has it."""

    header: RecordHeader
    label: str
    """What its pages are named by: new for each write, so that nobody ever reads pages of another one."""


class Catalog:
    """Headers by key, in a folder that all servers of one store share."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        make_private(folder)

    def find(self, key: ChunkKey) -> Entry | None:
        """Read an entry; ``None`` where there is none, or it is damaged or cannot be decoded here."""
        try:
            data = self._file(key).read_bytes()
        except FileNotFoundError:
            return None
        header = read_header(key, data)
        if header is None or not header.can_decode:
            return None
        return Entry(header, data[header.header_bytes :].decode("ascii", "replace"))

    def has(self, key: ChunkKey) -> bool:
        """Whether there is a header, good or not."""
        return self._file(key).is_file()

    def add(self, key: ChunkKey, header: bytes, label: str) -> None:
        """Make a record exist; its layers must be there, in pages with this label (ASCII)."""
        write_private(self._file(key), header + label.encode("ascii"))

    def remove(self, key: ChunkKey) -> bool:
        """Make a record not exist; ``False`` if it did not."""
        try:
            self._file(key).unlink()
        except FileNotFoundError:
            return False
        return True

    def keys(self, *, by_use: bool = False) -> list[ChunkKey]:
        """All keys; by name, or the longest unused first."""
        found: list[tuple[float, ChunkKey]] = []
        for namespace in sorted(self.folder.iterdir()):
            if not _NAMESPACE.fullmatch(namespace.name):
                continue
            for file in sorted(namespace.glob("*/*.header")):
                if parts := _NAME.fullmatch(file.name):
                    with contextlib.suppress(OSError):
                        used = file.stat().st_mtime if by_use else 0.0
                        key = ChunkKey(namespace.name, parts[1], int(parts[2]))
                        found.append((used, key))
        return [key for _, key in sorted(found, key=lambda pair: pair[0])]

    def used(self, keys: Iterable[ChunkKey]) -> None:
        """Note use."""
        for key in keys:
            with contextlib.suppress(OSError):
                os.utime(self._file(key))

    def tell(self, namespace: str, told: bytes) -> None:
        """Keep what a namespace stands for."""
        write_private(self.folder / namespace / "context.json", told)

    def describe(self, namespace: str) -> dict[str, Any] | None:
        """Read what :meth:`tell` kept."""
        try:
            return read_description((self.folder / namespace / "context.json").read_bytes())
        except FileNotFoundError:
            return None

    def note_member(self, group: str, key: ChunkKey) -> None:
        """Put a record into a group; the oldest ones go where it has too many, and so do the oldest groups."""
        if not self._group(group).is_dir():
            self._drop_groups()
        write_private(self._group(group) / f"{key.namespace}-{key.digest}-{key.num_tokens}", b"")
        for file in self._files_of(group)[:-_MOST_MEMBERS]:
            file.unlink(missing_ok=True)

    def members(self, group: str) -> list[ChunkKey]:
        """Keys of a group, the one that was noted last at the end; some may be gone."""
        named = (_MEMBER.fullmatch(file.name) for file in self._files_of(group))
        return [ChunkKey(found[1], found[2], int(found[3])) for found in named if found]

    def _files_of(self, group: str) -> list[Path]:
        return _by_age(self._group(group).glob("*-*-*"))

    def _drop_groups(self) -> None:
        """Make room for another one; some more go at once, so that they are not gone through for each."""
        groups = list((self.folder / "groups").glob("*/"))
        if len(groups) < _MOST_GROUPS:
            return
        for folder in _by_age(groups)[: len(groups) - _MOST_GROUPS + max(1, _MOST_GROUPS // 16)]:
            shutil.rmtree(folder, ignore_errors=True)

    def _group(self, group: str) -> Path:
        return self.folder / "groups" / group

    def sync(self) -> None:
        """Make removals survive a power cut."""
        for folder in self._folders():
            with contextlib.suppress(FileNotFoundError):
                sync_folder(folder)

    def _folders(self) -> Iterator[Path]:
        """Folders of headers: what makes a record exist."""
        for folder in self.folder.glob("*/*/"):
            if _NAMESPACE.fullmatch(folder.parent.name):
                yield folder
        yield self.folder

    def _file(self, key: ChunkKey) -> Path:
        return (
            self.folder / key.namespace / key.digest[:2] / f"{key.digest}-{key.num_tokens}.header"
        )


def _by_age(paths: Iterable[Path]) -> list[Path]:
    """Paths that are there, the one that was changed last at the end."""
    found: list[tuple[int, str, Path]] = []
    for path in paths:
        with contextlib.suppress(OSError):
            found.append((path.stat().st_mtime_ns, path.name, path))
    return [path for _, _, path in sorted(found)]
