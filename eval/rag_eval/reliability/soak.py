"""Long load: memory and descriptors stay, SIGTERM under load ends in time, a killed scheduler is noticed."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import httpx
import psutil

from rag_eval.benchmarks.load_run import LoadTarget, run_load
from rag_eval.benchmarks.load_server import started_server
from rag_eval.errors import EvalError
from rag_eval.reliability.figure import Outcome, Plan

STOP_S, UNREADY_S, SLOPE_MIB_H, DESCRIPTORS = 30.0, 5.0, 1.0, 8
_HOUR = 3600
_FIRST_LOAD_S, _REST_S, _WARM_S = 10.0, 10, 300


def run(plan: Plan) -> Outcome:
    """Full size: one hour of load, 100 stops under load, 100 killed schedulers."""
    outcome = Outcome()
    seconds, stops = plan.size(_HOUR, 20), plan.size(100, 1)
    outcome.note = f"{seconds} s of load, {stops} stops and {stops} kills" if stops < 100 else ""
    with started_server(plan.model, plan.folder / "load") as target:
        _stays_small(target, seconds, plan, outcome)
    for number in range(stops):
        with started_server(plan.model, plan.folder / f"stop-{number}") as target:
            _under_load(target, plan, lambda one: _stops(one, outcome))
        with started_server(plan.model, plan.folder / f"kill-{number}") as target:
            _loses_scheduler(target, outcome)
    return outcome


def _family(target: LoadTarget) -> list[psutil.Process]:
    parent = psutil.Process(target.pid)
    return [parent, *parent.children(recursive=True)]


def _stays_small(target: LoadTarget, seconds: int, plan: Plan, outcome: Outcome) -> None:
    """Sample the memory of the processes; a line through the second half gives the slope.

    Descriptors are counted at rest, behind a first short load and at the end: each connection has one.
    """
    asyncio.run(run_load(target, seconds=_FIRST_LOAD_S, concurrency=16, seed=plan.seed))
    before = _descriptors_at_rest(target)
    samples: list[tuple[float, float]] = []
    done = threading.Event()

    def sample() -> None:
        began = time.monotonic()
        while not done.wait(max(0.5, seconds / 200)):
            family = _family(target)
            rss = sum(p.memory_info().rss for p in family) / 2**20
            samples.append((time.monotonic() - began, rss))

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    report = asyncio.run(run_load(target, seconds=float(seconds), concurrency=16, seed=plan.seed))
    done.set()
    thread.join()
    outcome.tried += report.requests
    for fault in report.faults:
        outcome.fault(fault)
    half = samples[len(samples) // 2 :]
    slope = _slope(half) * _HOUR
    # Caches fill in the first minutes: a short run says what it saw and is held to nothing.
    limit = SLOPE_MIB_H if seconds >= _HOUR else None
    outcome.measure("rss_slope_mib_per_h", slope, limit)
    outcome.measure("rss_max_mib", max(rss for _, rss in samples))
    outcome.measure("descriptor_growth", _descriptors_at_rest(target) - before, DESCRIPTORS)


def _descriptors_at_rest(target: LoadTarget) -> int:
    """Fewest descriptors of the processes while connections that are kept alive run out."""
    counts: list[int] = []
    for _ in range(_REST_S):
        time.sleep(1)
        counts.append(sum(process.num_fds() for process in _family(target)))
    return min(counts)


def _slope(points: list[tuple[float, float]]) -> float:
    """Least squares slope per second."""
    count = len(points)
    x0 = sum(x for x, _ in points) / count
    y0 = sum(y for _, y in points) / count
    below = sum((x - x0) ** 2 for x, _ in points)
    return sum((x - x0) * (y - y0) for x, y in points) / below if below else 0.0


def _under_load(target: LoadTarget, plan: Plan, act: Callable[[LoadTarget], None]) -> None:
    begun = threading.Event()

    def load() -> None:
        # Its server goes away: what it sees of that is not this figure's business.
        with suppress(httpx.HTTPError):
            asyncio.run(
                run_load(target, seconds=60, concurrency=16, seed=plan.seed, begun=begun.set)
            )

    threading.Thread(target=load, daemon=True).start()
    if not begun.wait(_WARM_S):
        raise EvalError(f"the server was not warm after {_WARM_S} s; is the machine busy?")
    time.sleep(2)
    act(target)


def _stops(target: LoadTarget, outcome: Outcome) -> None:
    outcome.tried += 1
    family = _family(target)
    began = time.monotonic()
    os.kill(target.pid, signal.SIGTERM)
    _, alive = psutil.wait_procs(family, timeout=3 * STOP_S)
    outcome.measure("stop_s", time.monotonic() - began, STOP_S)
    if alive:
        outcome.fault(f"SIGTERM left {len(alive)} processes: {[p.name() for p in alive]}")


def _loses_scheduler(target: LoadTarget, outcome: Outcome) -> None:
    """Kill the process that holds the model; the server may not go on calling itself ready.

    Measured is when it last did. Silence is no refusal: a server that is slow may yet call itself ready.
    """
    outcome.tried += 1
    scheduler = max(_family(target), key=lambda p: p.memory_info().rss)
    scheduler.kill()
    began = time.monotonic()
    last_ready = 0.0
    headers = {"Authorization": f"Bearer {target.operator_key}"}
    while time.monotonic() - began < 60:
        try:
            answer = httpx.get(f"{target.url}/ready", headers=headers, timeout=1, trust_env=False)
            if answer.status_code != 200:
                break
            last_ready = time.monotonic() - began
        except httpx.TimeoutException:
            continue
        except httpx.TransportError:
            break
        time.sleep(0.1)
    else:
        outcome.fault("a minute after its scheduler was killed the server had not refused")
    outcome.measure("unready_s", last_ready, UNREADY_S)
