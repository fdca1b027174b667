"""Notices of erasure that one engine has to follow: of its own machine, and of others that share its store."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rag_pipeline.erasure import NOTICE_S, names, notices

if TYPE_CHECKING:
    from rag_pipeline.notices import Notice
    from rag_pipeline.sglang_plugin.fusion.builds.notice_exchange import NoticeExchange


class NoticesInForce:
    """What was told, what of it is in force, and what was not gone through yet.

    :meth:`hear` may be called from any thread, as threads that write do; everything else is for the one that erases.

    Parameters
    ----------
    exchange : NoticeExchange or None
        With other machines.
    deaf : callable
        Called with an error where notices of other machines cannot be read: then nothing of them is known.

    Attributes
    ----------
    in_force : list of (float, Notice)
        Notices, and until when, a time of :func:`time.monotonic`. Replaced, never changed: it may be read at any time.
    unfinished : list of Notice
        What the tiers and the passage were not gone through for; in force for as long.
    """

    def __init__(
        self, exchange: NoticeExchange | None, *, deaf: Callable[[Exception], None]
    ) -> None:
        self.exchange = exchange
        self.in_force: list[tuple[float, Notice]] = []
        self.unfinished: list[Notice] = []
        self._deaf = deaf
        self._lock = threading.Lock()
        self._seen: set[str] = set()
        self._before: set[str] | None = None
        """Those of this machine that were too old already when they were looked for first; None before that."""
        self._new: list[Notice] = []
        """In force, and not taken yet."""
        self._unpassed: list[Notice] = []
        """Those of this machine that others may not have been told of."""

    def hear(self) -> None:
        """Put new notices in force."""
        with self._lock:
            # Those of this machine first: they say which folders were gone through.
            new = self._from_here()
            self._unpassed += new
            try:
                new += self._from_others()
            except Exception as error:
                self._deaf(error)
            if not new:
                return
            until = time.monotonic() + NOTICE_S
            self.in_force = self.in_force + [(until, notice) for notice in new]
            self._new += new

    def _from_here(self) -> list[Notice]:
        if self._before is None:
            there = names()
            new = list(notices(self._seen))
            self._before = there - self._seen
            return new
        # However old it seems: a look may have taken long, and a clock may jump.
        new = list(notices(self._seen | self._before, most_age_s=math.inf))
        self._seen.update(notice.name for notice in new)
        return new

    def _from_others(self) -> list[Notice]:
        found = [] if self.exchange is None else self.exchange.read()
        new = [notice for notice in found if notice.name not in self._seen]
        self._seen.update(notice.name for notice in new)
        return new

    def take(self) -> list[Notice]:
        """Return the notices that are new since the last call, and end those whose time is over."""
        self.hear()
        now = time.monotonic()
        with self._lock:
            new, self._new = self._new, []
            self.unfinished += new
            kept = {id(notice) for notice in self.unfinished}
            in_force = [(t, n) for t, n in self.in_force if t > now or id(n) in kept]
            if len(in_force) < len(self.in_force):
                self.in_force = in_force
        return new

    def pass_on(self) -> list[Exception]:
        """Tell other machines, before the store that they share is gone through; returns what failed."""
        if self.exchange is None:
            return []
        with self._lock:
            new, self._unpassed = self._unpassed, []
        try:
            self.exchange.pass_on(new)
        except Exception as error:
            return [error]
        return []

    def finish(self, told: Sequence[Notice]) -> None:
        """Note that everything was gone through for some notices."""
        done = {id(notice) for notice in told}
        self.unfinished = [notice for notice in self.unfinished if id(notice) not in done]
        if self.exchange is not None:
            self.exchange.done(told)
