"""The queue for blocking work: it has an end, tenants take turns, and what is cancelled waits nowhere."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from rag_pipeline.server.errors import ApiError
from rag_pipeline.server.work_pool import WorkPool


def test_a_full_queue_refuses_at_once_and_takes_again_when_there_is_room() -> None:
    async def run() -> None:
        pool, gate = WorkPool(1, limit=4, share=2), threading.Event()

        def ask(tenant: str) -> asyncio.Task[bool]:
            return asyncio.ensure_future(pool.run(tenant, gate.wait, 60))

        waiting = [ask(tenant) for tenant in ("a", "a", "b", "c")]
        # Who holds a place of another limit waits here too, and neither takes a place nor needs one.
        waiting.insert(0, asyncio.ensure_future(pool.run_held("a", gate.wait, 60)))
        await asyncio.sleep(0)
        for tenant, status in (("a", 429), ("b", 503), ("d", 503)):
            with pytest.raises(ApiError) as refusal:
                await pool.run(tenant, int)
            assert (refusal.value.status, refusal.value.retry_s) == (status, 1)
        waiting.pop().cancel()  # its client went: the place is free
        await asyncio.sleep(0)
        waiting.append(ask("b"))
        await asyncio.sleep(0)
        gate.set()
        assert await asyncio.gather(*waiting) == [True] * 5
        assert await pool.run("a", int) == 0

    asyncio.run(run())


def test_who_has_many_jobs_waiting_waits_for_them_itself() -> None:
    """Questions and searches of one key stand in one row, those of another beside it."""

    async def run() -> None:
        pool, order = WorkPool(1, limit=64, share=32), list[str]()
        begun, gate = threading.Event(), threading.Event()

        def hold() -> None:
            begun.set()
            gate.wait(60)

        waiting = [asyncio.ensure_future(pool.run("loop", hold))]
        await asyncio.to_thread(begun.wait, 60)
        jobs = [pool.run_held("loop", order.append, f"question {n}") for n in range(20)]
        jobs += [pool.run("loop", order.append, f"search {n}") for n in range(20)]
        jobs += [pool.run("quiet", order.append, f"quiet {n}") for n in range(2)]
        waiting += [asyncio.ensure_future(job) for job in jobs]
        await asyncio.sleep(0)
        waiting[1].cancel()
        await asyncio.sleep(0)
        gate.set()
        await asyncio.gather(*waiting, return_exceptions=True)
        assert order[:4] == ["question 1", "quiet 0", "question 2", "quiet 1"]
        questions = [f"question {n}" for n in range(3, 20)]
        assert order[4:] == questions + [f"search {n}" for n in range(20)]

    asyncio.run(run())


def test_jobs_whose_clients_went_wait_nowhere() -> None:
    async def run() -> None:
        pool, gate = WorkPool(1, limit=4, share=2), threading.Event()
        first = asyncio.ensure_future(pool.run("a", gate.wait, 60))
        await asyncio.sleep(0)
        for number in range(500):
            job = asyncio.ensure_future(pool.run("ab"[number % 2], int))
            await asyncio.sleep(0)
            job.cancel()
            await asyncio.gather(job, return_exceptions=True)
        assert (pool._waiting, pool._num_waiting) == ({}, 0)
        assert pool._threads._work_queue.qsize() <= 4
        last = asyncio.ensure_future(pool.run("b", int))
        await asyncio.sleep(0)
        gate.set()
        assert await asyncio.gather(first, last) == [True, 0]

    asyncio.run(run())


def test_a_job_for_which_there_is_no_thread_keeps_no_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def run() -> None:
        pool = WorkPool(1, limit=1, share=1)
        with monkeypatch.context() as full:
            full.setattr(ThreadPoolExecutor, "submit", _no_thread)
            with pytest.raises(RuntimeError, match="can't start new thread"):
                await pool.run("a", int)
        assert await pool.run("a", int) == 0

    asyncio.run(run())


def _no_thread(*args: object) -> None:
    raise RuntimeError("can't start new thread")


def test_a_job_that_fails_leaves_its_place() -> None:
    async def run() -> None:
        pool = WorkPool(1, limit=1, share=1)
        for _ in range(3):
            with pytest.raises(ZeroDivisionError):
                await pool.run("a", lambda: 1 / 0)

    asyncio.run(run())
