"""Turns at something scarce, in the order of asking: whoever has just had one waits behind the others."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_LOOK_S = 0.1


class Turns:
    """A semaphore that is fair; the standard library's may be taken again by its last holder for ever.

    Parameters
    ----------
    slots : int
        Turns at once.
    """

    def __init__(self, slots: int = 1) -> None:
        self._free = slots
        self._lock = threading.Lock()
        self._waiting: deque[threading.Event] = deque()

    @contextmanager
    def turn(self, check: Callable[[], None] | None = None) -> Iterator[None]:
        """Hold one turn.

        Parameters
        ----------
        check : callable, optional
            Called repeatedly while waiting; gives up by raising.
        """
        self._take(check)
        try:
            yield
        finally:
            with self._lock:
                self._pass_on()

    def _take(self, check: Callable[[], None] | None) -> None:
        mine = threading.Event()
        with self._lock:
            if self._free:
                self._free -= 1
                return
            self._waiting.append(mine)
        try:
            while not mine.wait(None if check is None else _LOOK_S):
                if check is not None:
                    check()
        except BaseException:
            with self._lock:
                if mine.is_set():
                    self._pass_on()
                else:
                    self._waiting.remove(mine)
            raise

    def _pass_on(self) -> None:
        if self._waiting:
            self._waiting.popleft().set()
        else:
            self._free += 1
