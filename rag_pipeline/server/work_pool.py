"""Blocking work beside the event loop: few threads, a queue with an end, and no tenant with all of it.

A queue without an end answers everybody, too late to be of use, and lets nobody know. One more than the
queue holds is told at once to come back.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from rag_pipeline.server.budget import Count

T = TypeVar("T")


class WorkPool:
    """Threads for searches and what else blocks.

    Parameters
    ----------
    threads
        That work at once.
    limit
        Jobs that wait or run, those of :meth:`run_held` apart.
    share
        Of them, those of one tenant.
    """

    def __init__(self, threads: int, *, limit: int, share: int) -> None:
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="rag-work")
        self._jobs = Count("searches and listings", limit, share=share)
        self._lock = threading.Lock()

    async def run(self, tenant: str, function: Callable[..., T], *args: Any) -> T:
        """Run a job of a tenant; one whose client has gone while it waited is dropped.

        Raises
        ------
        ApiError
            429 where the tenant has its share under way, 503 where there is no room at all.
        """
        with self._lock:
            self._jobs.add(tenant, 1)
        job = self._threads.submit(function, *args)
        job.add_done_callback(lambda done: self._ended(tenant))
        return await asyncio.wrap_future(job)

    async def run_held(self, function: Callable[..., T], *args: Any) -> T:
        """Run a job whose caller holds a place of another limit: it waits in the same queue and is not refused."""
        return await asyncio.wrap_future(self._threads.submit(function, *args))

    def check_room(self, tenant: str) -> None:
        """Refuse a job of a tenant as :meth:`run` would.

        Raises
        ------
        ApiError
            429 where the tenant has its share under way, 503 where there is no room at all.
        """
        self._jobs.check(tenant, 1)

    def _ended(self, tenant: str) -> None:
        with self._lock:
            self._jobs.give_back(tenant, 1)
