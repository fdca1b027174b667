"""Calls of a place that may hang or be gone: a bound on each wait, and none at all while the breaker is open."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable
from typing import TypeVar

from chunk_cache.errors import ChunkCacheError
from chunk_cache.tiers.breaker import CircuitBreaker
from chunk_cache.tiers.deadline import BoundedCalls

logger = logging.getLogger(__name__)

LONG_WAITS = 10
"""What no request waits for, such as a whole record or a listing, may take so many times as long."""

T = TypeVar("T")


class TierDownError(OSError):
    """A tier is not asked now, because it did not answer lately."""


class GuardedCalls:
    """Calls of one place behind a :class:`CircuitBreaker`, counted; safe from any thread.

    Parameters
    ----------
    name : str
        Of the place, for messages; without secrets.
    breaker : CircuitBreaker
        Knows whether the place is asked now.
    wait_s : float
        Longest that a look-up waits, seconds.
    may_hang : bool
        Whether a call may never return, so that each needs a bound from outside. Then only a call that does not
        return, or a time-out of the system, opens the breaker.

    Attributes
    ----------
    counts : Counter of str
        What became of the calls.
    """

    def __init__(
        self, name: str, breaker: CircuitBreaker, *, wait_s: float, may_hang: bool
    ) -> None:
        self.name = name
        self.breaker = breaker
        self.counts: Counter[str] = Counter()
        self._wait_s = wait_s
        self._may_hang = may_hang
        self._counting = threading.Lock()
        self._calls = BoundedCalls()

    def stats(self) -> dict[str, int | str]:
        """JSON-ready counts and the breaker's state."""
        with self._counting:
            return {"state": self.breaker.state, **self.counts}

    def count(self, kind: str, number: int = 1) -> None:
        """Add to :attr:`counts`; from any thread."""
        with self._counting:
            self.counts[kind] += number

    def demand(self, call: Callable[[], T]) -> T:
        """Call, unless the tier is known to be down; a tier that may hang is waited for as long as for a listing.

        Raises
        ------
        TierDownError
            It is not asked now.
        OSError, ChunkCacheError
            What the call raised; an :class:`OSError` says that the tier did not answer.
        """
        return self._call(call, LONG_WAITS * self._wait_s if self._may_hang else None)

    def demand_layer(self, call: Callable[[], T]) -> T:
        """As :meth:`demand`, for what a request waits for: no longer than for a look-up where the tier may hang."""
        return self._call(call, self._wait_s if self._may_hang else None)

    def _call(self, call: Callable[[], T], seconds: float | None) -> T:
        """Call under a permit: in a thread that may be left behind after so many seconds, or in this one (None)."""
        permit = self.breaker.enter()
        if permit is None:
            self.count("skipped")
            raise TierDownError(
                f"{self.name} did not answer lately; it is tried again in {self.breaker.wait_s:.1f} s"
            )
        try:
            value = call() if seconds is None else self._calls.run(call, seconds)
        except ChunkCacheError:
            self._answered(permit)
            raise
        except Exception as error:
            if self._may_hang and not isinstance(error, TimeoutError):
                self.count("failures")
                self._answered(permit)
            else:
                self.failed(permit, error)
            if isinstance(error, OSError):
                raise
            raise OSError(f"{self.name}: {type(error).__name__}: {error}") from error
        self._answered(permit)
        return value

    def failed(self, permit: int, error: Exception) -> None:
        """Report a failure under a permit, and say so once."""
        self.count("timeouts" if isinstance(error, TimeoutError) else "failures")
        if self.breaker.failure(permit):
            self.count("opened")
            logger.warning(
                "%s does not answer (%s); requests do without it meanwhile",
                self.name,
                " ".join(str(error).split()) or type(error).__name__,
            )

    def _answered(self, permit: int) -> None:
        if self.breaker.success(permit):
            self.count("closed")
            logger.info("%s answers again", self.name)

    def _found(self, value: T | None) -> T | None:
        self.count("misses" if value is None else "hits")
        return value

    def _ask(self, call: Callable[[], T], otherwise: T, *, waits: int = 1) -> T:
        """Call in a thread that may be left behind, and wait for it no longer than allowed."""
        try:
            return self._call(call, waits * self._wait_s)
        except ChunkCacheError:
            self.count("damaged")
        except OSError:
            pass
        return otherwise
