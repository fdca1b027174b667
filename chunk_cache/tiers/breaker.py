"""A circuit breaker: after a failure nobody waits for the same place again until one caller has tried it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class CircuitBreaker:
    """Closed while calls succeed, open for a while after one failed, then half-open for one caller.

    Parameters
    ----------
    first_wait_s : float
        How long it stays open after a first failure, seconds; each try that fails doubles it.
    most_wait_s : float
        Bound of that.
    clock : callable
        Seconds that only grow.

    Notes
    -----
    After M. Nygard, *Release It!* (2007), with one failure as the threshold: a failure here is a wait, and the
    promise is that it is paid once. Calls that were under way when it opened report under an old permit, which says
    nothing any more: ten that time out together count once. A try whose caller never reports is given up after the
    wait it was tried for.
    """

    def __init__(
        self,
        *,
        first_wait_s: float = 1.0,
        most_wait_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._first_wait_s = first_wait_s
        self._most_wait_s = most_wait_s
        self._clock = clock
        self._lock = threading.Lock()
        self._permit = 0
        self._wait_s = 0.0
        """0 while closed."""
        self._until = 0.0
        """When the next try is due, while it is not closed."""
        self._trying = False

    @property
    def state(self) -> str:
        """``closed``, ``open`` or ``half-open``."""
        with self._lock:
            if not self._wait_s:
                return "closed"
            return "half-open" if self._trying or self._clock() >= self._until else "open"

    @property
    def wait_s(self) -> float:
        """Seconds until the next try is due; 0 where anybody may call."""
        with self._lock:
            return max(0.0, self._until - self._clock()) if self._wait_s else 0.0

    def enter(self) -> int | None:
        """Ask for a permit to call; ``None`` where nobody may now. Whoever has one reports how it went."""
        with self._lock:
            if not self._wait_s:
                return self._permit
            now = self._clock()
            if now < self._until:
                return None
            self._trying = True
            self._permit += 1
            self._until = now + self._wait_s
            return self._permit

    def success(self, permit: int) -> bool:
        """Report that the place answered; whether this closed the breaker."""
        with self._lock:
            if permit != self._permit or not self._wait_s:
                return False
            self._wait_s, self._trying = 0.0, False
            return True

    def failure(self, permit: int) -> bool:
        """Report that it did not answer in time, or with nonsense; whether this opened a closed breaker."""
        with self._lock:
            if permit != self._permit:
                return False
            opened = not self._wait_s
            self._wait_s = (
                self._first_wait_s if opened else min(2 * self._wait_s, self._most_wait_s)
            )
            self._until = self._clock() + self._wait_s
            self._permit += 1
            self._trying = False
            return opened
