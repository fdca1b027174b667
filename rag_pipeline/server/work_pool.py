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
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from rag_pipeline.server.budget import Count

T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    future: Future[Any]
    work: Callable[[], Any]


class WorkPool:
    """Threads for searches and what else blocks.

    Parameters
    ----------
    threads : int
        That work at once.
    limit : int
        Jobs that wait or run, those of :meth:`run_held` apart.
    share : int
        Of them, those of one tenant.
    """

    def __init__(self, threads: int, *, limit: int, share: int) -> None:
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="rag-work")
        self._jobs = Count("searches and listings", limit, share=share)
        self._lock = threading.Lock()
        self._waiting: OrderedDict[str, deque[_Job]] = OrderedDict()
        self._num_waiting = 0
        self._tickets = 0
        """Threads that were asked for and have not taken a job yet; one per waiting job, or more."""

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
        future: Future[T] = Future()
        job = _Job(future, work)
        with self._lock:
            self._waiting.setdefault(tenant, deque()).append(job)
            self._num_waiting += 1
            # That of a job which was cancelled is left for the next.
            needs_ticket = self._tickets < self._num_waiting
            self._tickets += needs_ticket
        future.add_done_callback(lambda done: self._forget(tenant, job))
        try:
            if needs_ticket:
                self._threads.submit(self._work_one)
        except BaseException:
            with self._lock:
                self._tickets -= 1
            future.cancel()
            raise
        return future

    def _work_one(self) -> None:
        with self._lock:
            self._tickets -= 1
            if not self._waiting:
                return
            tenant, jobs = self._waiting.popitem(last=False)
            job = jobs.popleft()
            if jobs:
                self._waiting[tenant] = jobs
            self._num_waiting -= 1
        if not job.future.set_running_or_notify_cancel():
            return  # it was cancelled this very moment
        try:
            job.future.set_result(job.work())
        except BaseException as error:
            job.future.set_exception(error)

    def _forget(self, tenant: str, job: _Job) -> None:
        """Take a job out that was cancelled while it waited."""
        if not job.future.cancelled():
            return
        with self._lock:
            jobs = self._waiting.get(tenant, deque())
            if job in jobs:
                jobs.remove(job)
                self._num_waiting -= 1
                if not jobs:
                    del self._waiting[tenant]

    def _ended(self, tenant: str) -> None:
        with self._lock:
            self._jobs.give_back(tenant, 1)
