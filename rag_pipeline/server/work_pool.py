"""Blocking work beside the event loop: few threads, a queue with an end, and no tenant with all of it.

A queue without an end answers everybody, too late to be of use, and lets nobody know. One more than the
queue holds is told at once to come back. The tenants take turns: who has many jobs waiting waits for them
itself.
"""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
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
        self._waiting: OrderedDict[str, deque[tuple[Future[Any], Callable[[], Any]]]] = (
            OrderedDict()
        )

    async def run(self, tenant: str, function: Callable[..., T], *args: Any) -> T:
        """Run a job of a tenant; one whose client has gone while it waited is dropped.

        Raises
        ------
        ApiError
            429 where the tenant has its share under way, 503 where there is no room at all.
        """
        with self._lock:
            self._jobs.add(tenant, 1)
        try:
            job = self._submit(tenant, partial(function, *args))
        except BaseException:
            self._ended(tenant)
            raise
        job.add_done_callback(lambda done: self._ended(tenant))
        return await asyncio.wrap_future(job)

    async def run_held(self, tenant: str, function: Callable[..., T], *args: Any) -> T:
        """Run a job whose caller holds a place of another limit: it waits in the same queue and is not refused."""
        return await asyncio.wrap_future(self._submit(tenant, partial(function, *args)))

    def check_room(self, tenant: str) -> None:
        """Refuse a job of a tenant as :meth:`run` would.

        Raises
        ------
        ApiError
            429 where the tenant has its share under way, 503 where there is no room at all.
        """
        self._jobs.check(tenant, 1)

    def _submit(self, tenant: str, work: Callable[[], T]) -> Future[T]:
        job: Future[T] = Future()
        with self._lock:
            self._waiting.setdefault(tenant, deque()).append((job, work))
        try:
            # A thread is asked for per job, not for this job.
            self._threads.submit(self._work_one)
        except BaseException:
            job.cancel()
            raise
        return job

    def _work_one(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    return  # whoever came for a cancelled job did another's
                tenant, jobs = self._waiting.popitem(last=False)
                job, work = jobs.popleft()
                if jobs:
                    self._waiting[tenant] = jobs
            if job.set_running_or_notify_cancel():
                break
        try:
            job.set_result(work())
        except BaseException as error:
            job.set_exception(error)

    def _ended(self, tenant: str) -> None:
        with self._lock:
            self._jobs.give_back(tenant, 1)
