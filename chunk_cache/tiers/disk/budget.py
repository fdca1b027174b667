"""How much a store's folder may weigh, kept at every write: the longest unused files go first."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from chunk_cache.keys import ChunkKey
from chunk_cache.tiers.disk.layout import chunk_path, chunks_in
from chunk_cache.tiers.disk.private_files import temporary_files

DISK_BYTES = 16 << 30
"""Budget of a folder where nobody says another, bytes."""

_SLACK = 50
"""A trim makes this share of the budget free (one part in so many), so that not every write trims."""
_LOOK_AGAIN = 100
"""After so small a share of the budget the folder is looked at again: others may write to it too."""


class StoredFile(NamedTuple):
    """One chunk file."""

    used_ns: int
    key: ChunkKey
    num_bytes: int


class FolderBudget:
    """Book-keeping of one process about one folder.

    Several processes may write to a folder. Each counts what it writes itself, and looks at all files
    again whenever it has written a hundredth of the budget or has to make room.

    Parameters
    ----------
    folder : Path
        The store's folder.
    byte_budget : int
        Most bytes of all files.
    evict : callable
        Deletes a record that is not pinned; ``False`` if it is.
    """

    def __init__(self, folder: Path, byte_budget: int, evict: Callable[[ChunkKey], bool]) -> None:
        self._folder = folder
        self.byte_budget = byte_budget
        self._evict = evict
        self._bytes = 0
        self._room_until_look = 0

    def make_room(self, num_bytes: int) -> list[ChunkKey] | None:
        """Make room for a file that is about to be written, and count it.

        Returns
        -------
        list[ChunkKey] or None
            What was evicted; ``None`` where the file does not fit, because of its size or of pins.
        """
        if num_bytes > self.byte_budget:
            return None
        gone: list[ChunkKey] = []
        if num_bytes > self._room_until_look or self._bytes + num_bytes > self.byte_budget:
            gone = self.trim(self.byte_budget - num_bytes, slack=self.byte_budget // _SLACK)
            self._room_until_look = self.byte_budget // _LOOK_AGAIN
            if self._bytes + num_bytes > self.byte_budget:
                return None
        self._bytes += num_bytes
        self._room_until_look -= num_bytes
        return gone

    def trim(self, byte_budget: int, *, slack: int = 0) -> list[ChunkKey]:
        """Evict the longest unused records until all files fit, and then some `slack` more."""
        files = stored_files(self._folder)
        total = sum(file.num_bytes for file in files) + temporary_bytes(self._folder)
        gone: list[ChunkKey] = []
        if total > byte_budget:
            for file in files:
                if total <= byte_budget - slack:
                    break
                if self._evict(file.key):
                    gone.append(file.key)
                    total -= file.num_bytes
        self._bytes = total
        return gone


def stored_files(folder: Path) -> list[StoredFile]:
    """Every chunk file, the longest unused first."""
    found = []
    for key in chunks_in(folder):
        with contextlib.suppress(OSError):  # another process was faster
            status = os.stat(chunk_path(folder, key))  # noqa: PTH116 - a folder may hold 100,000
            found.append(StoredFile(status.st_mtime_ns, key, status.st_size))
    found.sort(key=lambda file: file.used_ns)
    return found


def temporary_bytes(folder: Path) -> int:
    """Bytes of files that are being written, or that a crash left."""
    total = 0
    for path in temporary_files(folder):
        with contextlib.suppress(OSError):
            total += path.stat().st_size
    return total
