"""Threads that let others go first."""

from __future__ import annotations

import os
import sys
import threading
from contextlib import suppress

_LARGEST_NICE = 19


def give_way(nice: int) -> None:
    """Let the other threads go before the calling one, where threads have a priority of their own.

    Parameters
    ----------
    nice : int
        Added to the process's nice value. With 10 a thread gets a tenth of a core that another one wants too.
    """
    if sys.platform == "linux":
        with suppress(OSError):  # a container that forbids it: work comes before order
            mine = os.getpriority(os.PRIO_PROCESS, os.getpid())
            thread = threading.get_native_id()
            os.setpriority(os.PRIO_PROCESS, thread, min(mine + nice, _LARGEST_NICE))
