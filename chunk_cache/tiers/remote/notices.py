"""Notices of erasure among servers that share a store: what one erases, the others hear of in the store itself."""

from __future__ import annotations

import abc
import threading
from collections.abc import Callable
from typing import NamedTuple, TypeVar

from chunk_cache.tiers.breaker import CircuitBreaker

KEEP_S = 30 * 24 * 3600.0
"""How long a notice stays in a store, seconds: a server that was off for longer does not hear of it."""

T = TypeVar("T")


class Posted(NamedTuple):
    """One notice as a board has it."""

    name: str
    body: bytes | None
    """What was posted; None where the board has lost it, so that anything may be meant."""


class NoticeBoard(abc.ABC):
    """Notices that all servers of one store can read; one object is one reader.

    A board knows nothing of what a notice says. Notices are added and never changed, and stay for :data:`KEEP_S`. Both
    methods may be called from any thread, raise :class:`OSError` where the store does not answer, and wait no longer
    than the store's ``timeout`` for each read of a socket.
    """

    limits: str = ""
    """One line where some servers of the store cannot read what is posted here; empty where all can."""

    @abc.abstractmethod
    def post(self, name: str, body: bytes) -> None:
        """Add a notice (`name`: lower-case letters, digits and ``-``); when it returns, every reader can read it.

        The same one may be posted more than once.
        """

    @abc.abstractmethod
    def new(self) -> list[Posted]:
        """Notices that this object has not returned before, the oldest first; some may come twice.

        What was read is returned by one call only: whoever is given a notice has to act on it.
        """


class GuardedBoard(NoticeBoard):
    """A board behind a :class:`CircuitBreaker`: a store that is down costs one wait, then none for a while.

    Parameters
    ----------
    board : NoticeBoard
        What to guard; its readers take turns.
    name : str
        For messages; without secrets.
    """

    def __init__(self, board: NoticeBoard, *, name: str) -> None:
        self.board = board
        self.name = name
        self.limits = board.limits
        self.breaker = CircuitBreaker()
        self._turn = threading.Lock()

    def post(self, name: str, body: bytes) -> None:
        """Add a notice; raises at once where the store is known to be down."""
        self._demand(lambda: self.board.post(name, body))

    def new(self) -> list[Posted]:
        """Read new notices; raises at once where the store is known to be down."""
        with self._turn:
            return self._demand(self.board.new)

    def _demand(self, call: Callable[[], T]) -> T:
        permit = self.breaker.enter()
        if permit is None:
            raise OSError(f"{self.name} did not answer lately")
        try:
            value = call()
        except Exception as error:
            self.breaker.failure(permit)
            if isinstance(error, OSError):
                raise
            raise OSError(f"{self.name}: {type(error).__name__}: {error}") from error
        self.breaker.success(permit)
        return value
