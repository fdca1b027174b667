"""One walk over a store's folder: what lies there, what crashes left, whose rights are too wide."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from chunk_cache.keys import ChunkKey
from chunk_cache.tiers.disk.layout import PIN_SUFFIX, chunk_of, is_namespace
from chunk_cache.tiers.disk.pins import read_pin, remove_pin
from chunk_cache.tiers.disk.private_files import is_temporary, sweep, tighten


class StoredFile(NamedTuple):
    """One chunk file."""

    used_ns: int
    key: ChunkKey
    num_bytes: int
    pinned_until: float = 0.0
    """As :func:`~chunk_cache.tiers.disk.pins.read_pin` says."""

    @property
    def is_pinned(self) -> bool:
        """Whether it is pinned at this moment."""
        return self.pinned_until > 0 and self.pinned_until > time.time()


@dataclass(slots=True)
class Listing:
    """Everything that was found."""

    files: list[StoredFile] = field(default_factory=list)
    """The longest unused first."""
    unfinished: int = 0
    """Temporary files: being written, or left by a crash."""
    unfinished_bytes: int = 0
    swept: int = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of all chunk files and temporary files."""
        return self.unfinished_bytes + sum(file.num_bytes for file in self.files)


def list_folder(folder: Path, *, tidy: bool = False) -> Listing:
    """Walk over a folder; files are not opened, and what is gone or cannot be read meanwhile is left out.

    Parameters
    ----------
    folder : Path
        The store's folder.
    tidy : bool
        Remove temporary files that nobody writes and pins that have ended, and take other users' rights.
    """
    found = Listing()
    if tidy:
        with contextlib.suppress(OSError):
            tighten(str(folder), folder.stat().st_mode)
    for entry in _entries(str(folder)):
        if entry.is_dir(follow_symlinks=False) and is_namespace(entry.name):
            _tighten(entry, tidy)
            for inner in _entries(entry.path):
                if inner.is_dir(follow_symlinks=False):
                    _tighten(inner, tidy)
                    _list_chunks(entry.name, inner.path, found, tidy)
                else:
                    _other(inner, found, tidy)
        else:
            _other(entry, found, tidy)
    found.files.sort(key=lambda file: file.used_ns)
    return found


def prune(folder: Path) -> None:
    """Remove folders without a file below those of namespaces; whoever writes there makes them again."""
    for path in folders_of(folder):
        if path.parent != folder:
            with contextlib.suppress(OSError):
                path.rmdir()


def folders_of(folder: Path) -> list[Path]:
    """Folders of all namespaces and the folders in these, inner ones first; some may be gone already."""
    outer = [entry for entry in _entries(str(folder)) if is_namespace(entry.name)]
    inner = [Path(entry.path) for one in outer for entry in _entries(one.path) if entry.is_dir()]
    return [*inner, *(Path(entry.path) for entry in outer)]


def _list_chunks(namespace: str, path: str, found: Listing, tidy: bool) -> None:
    chunks: list[tuple[str, StoredFile]] = []
    pinned: dict[str, float] = {}
    for entry in _entries(path):
        name = entry.name
        key = chunk_of(namespace, name)
        if key is None:
            if name.endswith(PIN_SUFFIX):
                until = pinned[name.removesuffix(PIN_SUFFIX)] = read_pin(Path(entry.path))
                if tidy and not until:
                    with contextlib.suppress(OSError):
                        remove_pin(Path(entry.path))
                    continue
            _other(entry, found, tidy)
            continue
        with contextlib.suppress(OSError):  # another process was faster
            status = entry.stat(follow_symlinks=False)
            if tidy:
                tighten(entry.path, status.st_mode)
            file = StoredFile(status.st_mtime_ns, key, status.st_size)
            chunks.append((name.partition(".")[0], file))
    found.files += [file._replace(pinned_until=pinned.get(stem, 0.0)) for stem, file in chunks]


def _other(entry: os.DirEntry[str], found: Listing, tidy: bool) -> None:
    if is_temporary(entry.name):
        if tidy and sweep(entry.path):
            found.swept += 1
            return
        with contextlib.suppress(OSError):
            found.unfinished_bytes += entry.stat(follow_symlinks=False).st_size
            found.unfinished += 1
    _tighten(entry, tidy)


def _tighten(entry: os.DirEntry[str], tidy: bool) -> None:
    if tidy:
        with contextlib.suppress(OSError):
            tighten(entry.path, entry.stat(follow_symlinks=False).st_mode)


def _entries(path: str) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(path) as entries:
            yield from entries
    except OSError:
        return
