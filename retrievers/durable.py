"""Files that survive a power cut, and one line where a disk refuses.

Everything that an index writes goes through Python's own files, so that a short write is an error here
and not in a library, and so that a test can make any single call fail.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from retrievers.errors import StorageError

_ADVICE = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space, or raise the quota",
    errno.EROFS: "name a folder that can be written",
    errno.EACCES: "name a folder that you may write",
    errno.EPERM: "name a folder that you may write",
    errno.EMFILE: "raise the limit of open files (`ulimit -n`)",
}


def create_file(path: Path) -> BinaryIO:
    """Open a new file to write, for its owner alone whatever the umask: it holds users' texts."""
    file = path.open("wb")
    os.fchmod(file.fileno(), 0o600)
    return file


def replace_file(path: Path, temporary: Path, content: bytes, *, private: bool = True) -> None:
    """Put bytes in a file's place in one step, synced; a failure leaves the old file and nothing beside it.

    The name itself survives a power cut only once the folder is synced too: that is the caller's.

    Parameters
    ----------
    path, temporary : Path
        The file, and its name until it is whole.
    content : bytes
        All of it.
    private : bool
        Whether it is for its owner alone, rather than for whom the umask lets.
    """
    try:
        with create_file(temporary) if private else temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def close_unfinished(file: BinaryIO) -> None:
    """Close a file that nobody wants any more; what is buffered may fail to be written."""
    with contextlib.suppress(OSError):
        file.close()


def write_text(path: Path, text: str) -> None:
    """Write text to a new file."""
    with create_file(path) as file:
        file.write(text.encode("utf-8"))


def write_array(path: Path, values: NDArray[Any]) -> None:
    """Write the bytes of an array to a new file."""
    with create_file(path) as file:
        file.write(np.ascontiguousarray(values).data.cast("B") if values.size else b"")


def sync_tree(folder: Path) -> None:
    """Make every file and folder below `folder`, and `folder` itself, survive a power cut."""
    for path in folder.iterdir():
        if path.is_dir():
            sync_tree(path)
        else:
            _sync(path)
    _sync(folder)


def sync_folder(folder: Path) -> None:
    """Make new, renamed and removed names inside `folder` survive a power cut."""
    _sync(folder)


def make_folders(folder: Path) -> None:
    """Make a folder with its parents; the names of all that are new survive a power cut.

    New ones are for their owner alone; one that exists keeps its mode.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir(mode=0o700, exist_ok=True)
    folder.mkdir(exist_ok=True)  # says so where it is a file
    for path in reversed(missing):
        _sync(path.parent)


def remove_tree(folder: Path) -> None:
    """Remove a folder with all that is in it; one that is gone already is no error."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(folder)


@contextlib.contextmanager
def storage_faults(what: str, *, state: str = "nothing was changed") -> Iterator[None]:
    """Turn a refusal of the disk into a :class:`StorageError` of one line.

    Parameters
    ----------
    what : str
        What cannot be done, as in ``"the index X cannot be written"``.
    state : str
        What is true afterwards.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        advice = _ADVICE.get(error.errno or 0, "check the disk")
        raise StorageError(
            f"{what} ({reason}); {state}; {advice} and try again", error.errno
        ) from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
