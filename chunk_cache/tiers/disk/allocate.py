"""Room on the disk for a file that is about to be written."""

from __future__ import annotations

import ctypes
import errno
import functools
import os
from collections.abc import Callable

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What is true of every way to write so many bytes."""


def allocate(descriptor: int, num_bytes: int) -> None:
    """Make an empty file so long, and have the file system find its blocks at once where it can.

    That is half of what writing costs ext4: with the blocks found one page at a time while 9 MB are copied, a record
    takes 3.2 ms of a core; with all of them found before, 1.5 ms. A full disk says so before anything is written.

    ``posix_fallocate`` is not used: on a file system that cannot, a network folder, it writes to every page instead.

    Raises
    ------
    OSError
        Where the disk refuses.
    """
    fallocate = _fallocate()
    if fallocate is not None and fallocate(descriptor, 0, 0, num_bytes) == 0:
        return
    number = ctypes.get_errno()
    if fallocate is not None and number in _FULL:
        raise OSError(number, os.strerror(number))
    os.ftruncate(descriptor, num_bytes)


@functools.cache
def _fallocate() -> Callable[..., int] | None:
    """The call of Linux; None elsewhere."""
    try:
        found = ctypes.CDLL(None, use_errno=True).fallocate
    except (OSError, AttributeError, TypeError):
        return None
    found.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    found.restype = ctypes.c_int
    call: Callable[..., int] = found
    return call
