"""Blocking work beside the event loop: few threads, a queue with an end, and no tenant with all of it.

A queue without an end answers everybody, too late to be of use, and lets nobody know. One more than the
queue holds is told at once to come back.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from rag_pipeline.server.errors import ApiError

T = TypeVar("T")

RETRY_S = 1


class WorkPool:
    """Threads for searches and what else blocks.

    Parameters
    ----------
    threads
        That work at once.
    limit
        Jobs that wait or run.
    share
        Of them, those of one tenant.
    """

    def __init__(self, threads: int, *, limit: int, share: int) -> None:
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="rag-work")
        self._limit = limit
        self._share = share
        self._jobs: Counter[str] = Counter()
        self._lock = threading.Lock()

    async def run(self, tenant: str, function: Callable[..., T], *args: Any) -> T:
        """Run a job of a tenant; one whose client has gone while it waited is dropped.

        Raises
        ------
        ApiError
            429 where the tenant has its share under way, 503 where there is no room at all.
        """
        with self._lock:
            self.check_room(tenant)
            self._jobs[tenant] += 1
        job = self._threads.submit(function, *args)
        job.add_done_callback(lambda done: self._ended(tenant))
        return await asyncio.wrap_future(job)

    def check_room(self, tenant: str) -> None:
        """Refuse a job of a tenant as :meth:`run` would.

        Raises
        ------
        ApiError
            429 where the tenant has its share under way, 503 where there is no room at all.
        """
        if self._jobs[tenant] >= self._share:
            status = 429 if self._share < self._limit else 503
            raise ApiError(
                status,
                f"{self._share} requests of this key wait already; send fewer at once",
                retry_s=RETRY_S,
            )
        if self._jobs.total() >= self._limit:
            raise ApiError(503, "the server has too much to do; try again", retry_s=RETRY_S)

    def _ended(self, tenant: str) -> None:
        with self._lock:
            self._jobs[tenant] -= 1
            if not self._jobs[tenant]:
                del self._jobs[tenant]
