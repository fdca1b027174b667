"""Processes that end with the one that started them, however that one ends: by SIGKILL, or before it had a handler."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from types import FrameType

__all__ = ["end_with_owner", "end_with_parent", "follow_owner"]

_PR_SET_PDEATHSIG = 1


def end_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent ends; end it now where the parent has gone already.

    The kernel means the thread that started it: a process that a thread starts and outlives must not call this.

    Parameters
    ----------
    parent : int
        Process id that the parent is known to have had.
    """
    _tell_by(signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def end_with_owner() -> None:
    """The same in a child of :mod:`multiprocessing`, whose parent may be a fork server.

    A fork server ends with its owner (:func:`follow_owner`), and this process with it. Where the owner had ended before this
    was called, this process ends now.
    """
    _tell_by(signal.SIGKILL)
    owner = multiprocessing.parent_process()
    if owner is not None and owner.pid is not None and _has_ended(owner.pid):
        os._exit(1)


def follow_owner(owner: int) -> None:
    """End this process, a fork server, when the process that started it ends.

    A fork server ends by itself only when its owner *and all its children* are gone. Any thread of the owner may have
    started it, and the kernel tells of the end of that thread, so the owner is looked at then. Children inherit the
    handler, which does nothing in them.
    """
    me, number = os.getpid(), signal.Signals(signal.SIGRTMIN)

    def look(number: int, frame: FrameType | None) -> None:
        if os.getpid() == me and os.getppid() != owner:
            os._exit(1)

    signal.signal(number, look)
    _tell_by(number)
    look(number, None)


def _tell_by(number: signal.Signals) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(number))


def _has_ended(pid: int) -> bool:
    import psutil

    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True
