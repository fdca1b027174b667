"""How many bytes lie in a folder, in one small file that every process of the folder locks and changes."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_FIELDS = struct.Struct("<qQ")
_WAIT_S = 10.0
"""Longest wait for the lock; another process holds it for as long as a folder is listed, at most."""
_LOOK_S = 0.001


@dataclass(slots=True)
class Usage:
    """What the file says, while its lock is held.

    Every change is written before whatever takes room, and after whatever frees it. So a process that is killed in
    between leaves a figure that is too high, never one that is too low; the next listing of the folder corrects it.
    """

    num_bytes: int
    """Of all records and of all temporary files, at the length they will have."""
    changes: int
    """Raised by each change to the folder; who finds what it left knows that nobody else changed anything."""
    is_known: bool
    """Whether there was a file to read."""
    descriptor: int
    """Of the open file."""

    def change(self, num_bytes: int) -> None:
        """Count that so many bytes came (or went, below 0), and write it.

        Raises
        ------
        OSError
            Where the disk refuses.
        """
        self.num_bytes = max(0, self.num_bytes + num_bytes)
        self.changes = (self.changes + 1) % (1 << 64)
        os.pwrite(self.descriptor, _FIELDS.pack(self.num_bytes, self.changes), 0)


@contextlib.contextmanager
def locked_usage(path: Path) -> Iterator[Usage]:
    """Lock the file and read it; it is made if it is not there.

    Where the file system has no locks, the figure is as right as the writers' luck: each listing corrects it.

    Raises
    ------
    OSError
        Where the disk refuses; if another process does not let go within 10 seconds.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        _lock(descriptor, path)
        data = os.pread(descriptor, _FIELDS.size, 0)
        if len(data) == _FIELDS.size:
            num_bytes, changes = _FIELDS.unpack(data)
            yield Usage(num_bytes, changes, True, descriptor)
        else:
            yield Usage(0, secrets.randbits(63), False, descriptor)
    finally:
        os.close(descriptor)


def changes_of(path: Path) -> int | None:
    """:attr:`Usage.changes` without the lock; ``None`` where it cannot be read."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    return int(_FIELDS.unpack(data)[1]) if len(data) == _FIELDS.size else None


def _lock(descriptor: int, path: Path) -> None:
    until = time.monotonic() + _WAIT_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() > until:
                raise OSError(error.errno, "another process holds the lock", str(path)) from None
            time.sleep(_LOOK_S)
        except OSError:
            return  # a file system without locks
        else:
            return
