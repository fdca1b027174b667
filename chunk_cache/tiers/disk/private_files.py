"""Files of a store: for their owner alone, whole or not at all, and what a crash left is told apart.

A file is written under a temporary name that its writer holds a lock on. A lock ends with its process,
so whoever gets the lock of a temporary file knows that nobody writes it any more.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import stat
import time
from collections.abc import Iterable
from pathlib import Path

from chunk_cache.tiers.disk.allocate import allocate
from chunk_cache.tiers.disk.vectors import rest_of

_FILE_MODE = 0o600
_FOLDER_MODE = 0o700
_WIDE = stat.S_IRWXG | stat.S_IRWXO
_UNLOCKED_LEFT_S = 3600
"""Age from which a temporary file is left over where the file system has no locks, seconds."""

_MOST_PARTS = 1024
"""Of one ``writev``, on Linux and the BSDs."""


class Draft:
    """A file under a temporary name, locked while it is written, until it is published or discarded.

    Not synced: after a power cut a short file fails its checksum and is a miss.

    Parameters
    ----------
    path : Path
        Final name; its folder is made.
    num_bytes : int
        The file is as long from the beginning, so that whoever weighs the folder sees what it will take.

    Raises
    ------
    OSError
        Where the disk refuses, here and in every method but :meth:`discard`.
    """

    def __init__(self, path: Path, num_bytes: int = 0) -> None:
        self.path = path
        self.num_bytes = num_bytes
        make_private(path.parent)
        try:
            self._open()
        except FileNotFoundError:
            make_private(path.parent)  # another process removed the folder meanwhile
            self._open()

    def _open(self) -> None:
        self._temporary = self.path.with_name(f".{self.path.name}.{secrets.token_hex(6)}.tmp")
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        descriptor = os.open(self._temporary, flags, _FILE_MODE)
        self._file = open(descriptor, "wb", buffering=0)  # noqa: PTH123, SIM115 - of a descriptor
        try:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if self.num_bytes:
                allocate(descriptor, self.num_bytes)
        except BaseException:
            self.discard()
            raise

    def write(self, parts: Iterable[bytes | bytearray | memoryview]) -> None:
        """Write the contents, by one call as a rule: each costs a turn of the interpreter, beside a forward that needs it."""
        left = [view for part in parts if len(view := memoryview(part).cast("B"))]
        while left:
            some = left[:_MOST_PARTS]
            left = rest_of(some, os.writev(self._file.fileno(), some)) + left[_MOST_PARTS:]

    def publish(self, used_ns: int | None = None) -> None:
        """Give the file its name, in place of what had it.

        Parameters
        ----------
        used_ns : int, optional
            Its time of change, nanoseconds; by default now.

        Raises
        ------
        FileNotFoundError
            If another process swept the file between its making and its lock.
        """
        if used_ns is not None:
            os.utime(self._file.fileno(), ns=(used_ns, used_ns))
        self._temporary.replace(self.path)
        self._file.close()

    def discard(self) -> bool:
        """Remove the temporary file; ``False`` where there is none any more, as once it is published."""
        self._file.close()
        try:
            self._temporary.unlink()
        except OSError:
            return False
        return True


def make_private(folder: Path) -> None:
    """Make a folder, and its parents, for this user alone; what is there stays as it is."""
    if not folder.is_dir():
        make_private(folder.parent)
        folder.mkdir(mode=_FOLDER_MODE, exist_ok=True)


def write_private(path: Path, data: bytes) -> None:
    """Write a file as a :class:`Draft` and publish it.

    Raises
    ------
    OSError
        Where the disk refuses; nothing is left behind.
    """
    try:
        _write(path, data)
    except FileNotFoundError:  # swept before its lock
        _write(path, data)


def _write(path: Path, data: bytes) -> None:
    draft = Draft(path)
    try:
        draft.write([data])
        draft.publish()
    except BaseException:
        draft.discard()
        raise


def is_temporary(name: str) -> bool:
    """Whether a file of this name is being written, or was left by a crash."""
    return name.startswith(".") and name.endswith(".tmp")


def sweep(path: str) -> bool:
    """Remove a temporary file if nobody writes it any more; ``False`` where it stays."""
    try:
        with open(path, "r+b") as file:  # noqa: PTH123
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            except OSError:
                if time.time() - os.fstat(file.fileno()).st_mtime < _UNLOCKED_LEFT_S:
                    return False
            os.unlink(path)  # noqa: PTH108
    except OSError:
        return False
    return True


def tighten(path: str, mode: int) -> None:
    """Take everybody else's rights to a file or folder of a mode; it stays if it is another user's, or gone."""
    if mode & _WIDE and not stat.S_ISLNK(mode):
        with contextlib.suppress(OSError):
            os.chmod(path, _FOLDER_MODE if stat.S_ISDIR(mode) else _FILE_MODE)  # noqa: PTH101


def sync_folder(folder: Path) -> None:
    """Make new and deleted names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
