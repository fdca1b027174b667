"""Calls that may be given up: each in a thread that is left behind where the call hangs."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

MOST_CALLS = 16
"""Calls that may hang at once. What hangs cannot be ended, so no more are begun."""
_IDLE_S = 10.0
"""A thread that nobody needed for so long ends, seconds."""

T = TypeVar("T")


class _Call:
    """One call: run by a worker, waited for by whoever asked."""

    __slots__ = ("_done", "_error", "_run", "_value")

    def __init__(self, run: Callable[[], Any]) -> None:
        self._run = run
        self._done = threading.Event()
        self._value: Any = None
        self._error: Exception | None = None

    def run(self) -> None:
        try:
            self._value = self._run()
        except Exception as raised:  # handed to whoever waits, if anybody still does
            self._error = raised

    def end(self) -> None:
        self._done.set()

    def wait(self, seconds: float) -> Any:
        if not self._done.wait(seconds):
            raise TimeoutError(f"no answer in {seconds:g} s")
        if self._error is not None:
            raise self._error
        return self._value


class BoundedCalls:
    """Runs calls one by one in threads of its own, which are kept for the next call while they are not hung.

    Thread-safe. The threads are daemons: what hangs must not keep the process from ending.

    Parameters
    ----------
    most : int
        Calls that may run, or hang, at once.
    """

    def __init__(self, most: int = MOST_CALLS) -> None:
        self._most = most
        self._free = threading.BoundedSemaphore(most)
        self._lock = threading.Lock()
        self._idle: list[queue.SimpleQueue[_Call]] = []

    def run(self, call: Callable[[], T], seconds: float) -> T:
        """Call, and wait no longer than so many seconds; what comes later is thrown away.

        Raises
        ------
        TimeoutError
            It did not return in time, too many calls hang already, or there is no thread for it.
        Exception
            What the call raised.
        """
        if not self._free.acquire(blocking=False):
            raise TimeoutError(f"{self._most} calls hang already")
        given = _Call(call)
        with self._lock:
            inbox = self._idle.pop() if self._idle else None
        if inbox is None:
            self._begin(given)
        else:
            inbox.put(given)
        value: T = given.wait(seconds)
        return value

    def _begin(self, call: _Call) -> None:
        worker = threading.Thread(
            target=self._work, args=(call,), name="chunk-kv-tier", daemon=True
        )
        try:
            worker.start()
        except RuntimeError as error:  # the system has no thread left for now
            self._free.release()
            raise TimeoutError(str(error)) from None

    def _work(self, call: _Call) -> None:
        inbox: queue.SimpleQueue[_Call] = queue.SimpleQueue()
        while True:
            call.run()
            with self._lock:
                self._idle.append(inbox)
            self._free.release()
            call.end()
            del call  # what it holds, such as an open file, must not wait for the next call
            try:
                call = inbox.get(timeout=_IDLE_S)
            except queue.Empty:
                with self._lock:
                    if inbox in self._idle:
                        self._idle.remove(inbox)
                        return
                call = inbox.get()  # given just now
