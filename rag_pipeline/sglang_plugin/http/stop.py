"""SIGTERM: no new request, a limit for those under way, then SGLang's own shutdown.

SGLang drains without a limit, goes on accepting, and does not see a request that is still searching. Its own
handler therefore runs when the guard's last request has ended, or been aborted.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from typing import Any, Protocol

__all__ = ["Door", "GracefulStop", "handle_sigterm"]

_ABORT_S = 3.0
"""For aborted requests to be answered."""
_LAST_S = 30.0
"""For SGLang's shutdown behind it: it looks every 5 s and gives its schedulers 15."""

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
    """

    def __init__(self, door: Door, *, limit_s: float, last_resort: Callable[[], None]) -> None:
        self._door = door
        self._limit_s = limit_s
        self._last_resort = last_resort
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
