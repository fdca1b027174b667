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
from collections.abc import Iterator
from pathlib import Path

_FILE_MODE = 0o600
_FOLDER_MODE = 0o700
_WIDE = stat.S_IRWXG | stat.S_IRWXO
_UNLOCKED_LEFT_S = 3600
"""Age from which a temporary file is left over where the file system has no locks, seconds."""


def make_private(folder: Path) -> None:
    """Make a folder, and its parents, for this user alone; what is there stays as it is."""
    if not folder.is_dir():
        make_private(folder.parent)
        folder.mkdir(mode=_FOLDER_MODE, exist_ok=True)


def write_private(path: Path, data: bytes) -> None:
    """Write a file under another name and rename it; its folder is made.

    Not synced: after a power cut a short file fails its checksum and is a miss.

    Raises
    ------
    OSError
        Where the disk refuses; nothing is left behind.
    """
    make_private(path.parent)
    try:
        _write(path, data)
    except FileNotFoundError:
        # Another process swept the file between its making and its lock, or removed the folder.
        make_private(path.parent)
        _write(path, data)


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _FILE_MODE)
    with open(descriptor, "wb", buffering=0) as file:  # noqa: PTH123 - of a descriptor
        try:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            view = memoryview(data)
            while view:
                view = view[file.write(view) :]
            temporary.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise


def temporary_files(folder: Path) -> Iterator[Path]:
    """Files that are being written, or that a crash left, below a folder."""
    return (path for path in folder.rglob(".*.tmp") if path.is_file())


def sweep(folder: Path) -> int:
    """Remove the temporary files that nobody writes any more; returns how many."""
    gone = 0
    for path in temporary_files(folder):
        with contextlib.suppress(OSError), path.open("r+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            except OSError:
                if time.time() - path.stat().st_mtime < _UNLOCKED_LEFT_S:
                    continue
            path.unlink()
            gone += 1
    return gone


def sync_folder(folder: Path) -> None:
    """Make new and deleted names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def tighten(folder: Path) -> int:
    """Take everybody else's rights to a folder and all in it; returns how many were too wide."""
    changed = 0
    for path in (folder, *folder.rglob("*")):
        with contextlib.suppress(OSError):  # another user's, or gone meanwhile
            mode = path.lstat().st_mode
            if stat.S_ISLNK(mode) or not mode & _WIDE:
                continue
            path.chmod(_FOLDER_MODE if stat.S_ISDIR(mode) else _FILE_MODE)
            changed += 1
    return changed
