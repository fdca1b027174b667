"""SIGTERM and Ctrl-C: no new request, a limit for those under way, then SGLang's own shutdown.

SGLang drains without a limit, goes on accepting, and does not see a request that is still searching. Its own
handler therefore runs when the guard's last request has ended, or been aborted. It has none for SIGINT: its HTTP server
ends by that, and the engine's processes, with what they have not written, are killed.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

__all__ = ["Door", "GracefulStop", "Interrupts", "handle_sigint", "handle_sigterm"]

_ABORT_S = 3.0
"""For aborted requests to be answered."""
_LAST_S = 30.0
"""For SGLang's shutdown behind it: it looks every 5 s and gives its schedulers 15."""
_SAME_S = 0.5
"""Interrupts that follow one within so many seconds are the same: ``timeout`` signals a process and then its group."""

logger = logging.getLogger(__name__)


class Door(Protocol):
    """What lets requests in: :class:`rag_pipeline.server.guard.Guard`."""

    stopping: bool
    in_flight: int


class GracefulStop:
    """The handler of one server.

    Parameters
    ----------
    door : Door
        What lets requests in.
    limit_s : float
        Seconds that requests have to end.
    last_resort : callable
        Ends this process and its children, whatever they do.
    end_background : callable, optional
        Ends work that no request waits for, at once: SGLang's shutdown waits for whatever the engine does.
    """

    def __init__(
        self,
        door: Door,
        *,
        limit_s: float,
        last_resort: Callable[[], None],
        end_background: Callable[[], None] = lambda: None,
    ) -> None:
        self._door = door
        self._limit_s = limit_s
        self._last_resort = last_resort
        self._end_background = end_background
        self._task: asyncio.Task[None] | None = None

    def on_signal(self, abort_all: Callable[[], None], finish: Callable[[], None]) -> None:
        """Begin; a second signal ends the waiting. Runs in the event loop."""
        if self._task is not None:
            self._limit_s = 0.0
            return
        self._door.stopping = True
        timer = threading.Timer(self._limit_s + _ABORT_S + _LAST_S, self._last_resort)
        timer.daemon = True
        timer.start()
        self._task = asyncio.get_running_loop().create_task(self._run(abort_all, finish))

    async def _run(self, abort_all: Callable[[], None], finish: Callable[[], None]) -> None:
        loop = asyncio.get_running_loop()
        started = loop.time()
        while self._door.in_flight and loop.time() - started < self._limit_s:
            await asyncio.sleep(0.1)
        if self._door.in_flight:
            logger.warning("Stopping: %d requests are aborted", self._door.in_flight)
            abort_all()
            until = loop.time() + _ABORT_S
            while self._door.in_flight and loop.time() < until:
                await asyncio.sleep(0.1)
        try:
            self._end_background()
        except Exception:
            logger.exception("Background work was not ended")
        finish()


def handle_sigterm(stop: GracefulStop) -> Callable[..., Any]:
    """Hook around SGLang's handler of SIGTERM."""

    def around(original: Callable[..., Any], handler: Any, *args: Any, **kwargs: Any) -> None:
        manager = handler.tokenizer_manager
        stop.on_signal(
            lambda: manager.abort_request(abort_all=True),
            lambda: original(handler, *args, **kwargs),
        )

    return around


class Interrupts:
    """The handler of SIGINT of one server: the first is a SIGTERM, a second ends everything at once.

    It is Python's own handler, not one of the event loop: SGLang's shutdown blocks the loop.

    Parameters
    ----------
    begin : callable
        Begins the orderly stop; called in the main thread, at any moment of the loop.
    end : callable
        Ends this process and its children.
    same_s : float
        How long after the first no other one counts, seconds.
    """

    def __init__(
        self, begin: Callable[[], object], end: Callable[[], object], *, same_s: float = _SAME_S
    ) -> None:
        self._begin = begin
        self._end = end
        self._same_s = same_s
        self._first: float | None = None

    def __call__(self, number: int, frame: object) -> None:
        """Take one."""
        now = time.monotonic()
        if self._first is None:
            self._first = now
            self._begin()
        elif now - self._first >= self._same_s:
            self._end()


def handle_sigint(end: Callable[[], object]) -> Callable[..., None]:
    """Hook behind the making of SGLang's handlers, which happens in the running loop of the HTTP server."""

    def after(result: Any, handler: Any, *args: Any, **kwargs: Any) -> None:
        loop = asyncio.get_running_loop()

        def begin() -> None:
            sys.stderr.write(
                "Stopping: requests under way end, chunk KV that waits is written; Ctrl-C again ends at once\n"
            )
            sys.stderr.flush()
            loop.call_soon_threadsafe(handler.sigterm_handler)

        signal.signal(signal.SIGINT, Interrupts(begin, end))

    return after
