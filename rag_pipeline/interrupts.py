"""One interrupt, however often it is sent: ``timeout`` signals a process and then its whole group, a person presses twice."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SAME_S = 2.0
"""Signals that follow one within so many seconds are the same interrupt: they would break off the orderly end."""
_last = float("-inf")
"""When the last interrupt was; one for all that wait for it."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def one_interrupt() -> Iterator[None]:
    """Have SIGINT and SIGTERM raise :class:`KeyboardInterrupt`, once for all that come within two seconds.

    What Ctrl-C ends in good order (an engine's processes, files under way), a supervisor can end too. Outside of the main
    thread, which alone gets signals, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        global _last
        now = time.monotonic()
        if now - _last >= _SAME_S:
            _last = now
            raise KeyboardInterrupt

    before = [(number, signal.signal(number, interrupt)) for number in _SIGNALS]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)
