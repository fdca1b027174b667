"""Drives an engine's event loop for callers in any thread or task.

An in-process SGLang engine belongs to one asyncio loop, which runs only while somebody drives it.
Its own synchronous calls drive it from the calling thread, which excludes a second thread and any
running loop. This runner drives the loop in a thread while there is work, and lets go when there
is none, so the engine's own synchronous calls still work in between.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class LoopRunner:
    """Runs coroutines on one event loop from any thread.

    Parameters
    ----------
    loop : AbstractEventLoop
        A loop that nobody runs at the moment.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._lock = threading.Lock()
        self._active = 0
        self._thread: threading.Thread | None = None

    def __enter__(self) -> LoopRunner:
        """Keep the loop running until the matching exit; nests across threads."""
        with self._lock:
            if self._active == 0:
                self._thread = threading.Thread(
                    target=self._drive, name="rag-engine-loop", daemon=True
                )
                self._thread.start()
            self._active += 1
        return self

    def __exit__(self, *exc: object) -> None:
        with self._lock:
            self._active -= 1
            if self._active:
                return
            self._loop.call_soon_threadsafe(self._loop.stop)
            assert self._thread is not None
            # Under the lock: the next caller must find the loop stopped before starting it again.
            self._thread.join()
            self._thread = None

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Schedule `coroutine`; only between enter and exit."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def _drive(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
