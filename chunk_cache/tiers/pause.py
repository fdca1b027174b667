"""Whether somebody computes, so that a thread with time may wait for a pause."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

PAUSE_S = 0.05
"""Without computing for so long there is a pause, seconds; the gap between two steps of a batch is none."""


class Pauses:
    """Told by one thread when it computes; any thread asks.

    Parameters
    ----------
    clock : callable
        Monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._computes = False
        self._ended = -math.inf

    def begin(self) -> None:
        """Computing begins."""
        self._computes = True

    def end(self) -> None:
        """It has ended."""
        self._ended = self._clock()
        self._computes = False

    def is_pause(self) -> bool:
        """Whether nobody computes, and nobody has for :data:`PAUSE_S`."""
        return not self._computes and self._clock() - self._ended >= PAUSE_S
