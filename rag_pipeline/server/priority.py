"""Who gives way on the server's own cores: what parses and embeds uploads, to questions.

An engine that computes on them gives way too, by less (:data:`rag_pipeline.sglang_plugin.http.server.ENGINE_NICE`).
The thread that writes an index does not: it holds the interpreter most of the time, and whoever waits for that would
wait as long as the engine's passes keep the thread from its core.
"""

from __future__ import annotations

import os
import sys
import threading
from contextlib import suppress

UPLOAD_NICE = 10
"""Added to the process's nice value."""


def give_way() -> None:
    """Let the other threads go before the calling one, where threads have a priority of their own."""
    if sys.platform == "linux":
        with suppress(OSError):  # a container that forbids it: work comes before order
            mine = os.getpriority(os.PRIO_PROCESS, os.getpid())
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), mine + UPLOAD_NICE)
