"""Send the mix, watch every answer, and look at the server when all is over."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

from rag_eval.benchmarks.load_requests import (
    KINDS,
    Request,
    make_request,
    refusal_line,
    warm_requests,
)
from rag_pipeline.sglang_plugin.integrity import INTEGRITY_KEY

_TIMEOUT_S = 300.0
_REST_S = 300.0
_MAX_FAULTS = 50
_STEADY_POLLS = 6
"""Looks at an unchanged chunk cache, half a second apart, after which nothing more is being stored."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadTarget:
    """A server to load.

    Parameters
    ----------
    url, operator_key : str
        Where it is, and the key that shows its state.
    tenants : mapping of str to str
        Key of each tenant.
    marks : mapping of str to str
        For each tenant a word that stands in its documents only.
    pid : int
        First process of the server; 0 where that is not known.
    """

    url: str
    operator_key: str
    tenants: Mapping[str, str]
    marks: Mapping[str, str]
    pid: int = 0


@dataclass(kw_only=True, slots=True)
class LoadReport:
    """What happened.

    Parameters
    ----------
    seconds, concurrency, requests : float, int, int
        As run; requests that were still under way at the end are waited for and counted.
    kinds : dict of str to dict
        Per kind: requests sent, statuses, median and 95th percentile of the wall time.
    at_rest : dict
        State of the server when nothing runs any more.
    faults : list of str
        Everything that must not be; empty for a server that is whole. The first 50.
    """

    seconds: float
    concurrency: int
    requests: int = 0
    kinds: dict[str, dict[str, Any]] = field(default_factory=dict)
    at_rest: dict[str, Any] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)


class _Watch:
    """Collects what every request did."""

    def __init__(self, target: LoadTarget) -> None:
        self._marks = target.marks
        self.times: dict[str, list[float]] = {kind: [] for kind in KINDS}
        self.statuses: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
        self.faults: list[str] = []
        self.own_marks_seen: Counter[str] = Counter()

    def note(self, request: Request, status: str, seconds: float) -> None:
        self.times[request.kind].append(seconds)
        self.statuses[request.kind][status] += 1

    def fault(self, text: str) -> None:
        if len(self.faults) < _MAX_FAULTS:
            self.faults.append(text)

    def read(self, tenant: str, request: Request, status: int, content: bytes) -> None:
        """Judge one answer that was read to its end."""
        for owner, mark in self._marks.items():
            if mark.encode() in content:
                if owner == tenant:
                    self.own_marks_seen[tenant] += 1
                else:
                    self.fault(f"{tenant} saw {owner}'s words at {request.path}")
        if status not in request.expected:
            self.fault(f"{request.kind} {request.path}: status {status}, {content[:200]!r}")
        elif status >= 400 and refusal_line(content) is None:
            self.fault(f"{request.kind} {request.path}: not one line, {content[:300]!r}")
        if status == 200 and b'"error"' in content[:2000] and request.kind != "aborted":
            self.fault(f"{request.kind} {request.path}: an error in the stream, {content[:300]!r}")


async def run_load(
    target: LoadTarget,
    *,
    seconds: float,
    concurrency: int,
    seed: int = 0,
    begun: Callable[[], object] = lambda: None,
) -> LoadReport:
    """Load a server and check it.

    Parameters
    ----------
    target : LoadTarget
        The server, on this machine.
    seconds : float
        How long new requests are begun.
    concurrency : int
        Requests under way at once.
    seed : int
        Of the mix.
    begun : callable
        Called when the server is warm and the load begins.
    """
    watch, numbers = _Watch(target), iter(range(1, 1 << 60))
    await _warm(target, watch)
    limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
    begun()
    began = time.monotonic()
    async with httpx.AsyncClient(
        base_url=target.url, timeout=_TIMEOUT_S, limits=limits, trust_env=False
    ) as client:

        async def worker(number: int) -> None:
            rng = random.Random(f"{seed}-{number}")
            while time.monotonic() - began < seconds:
                tenant = rng.choice(tuple(target.tenants))
                await _send(client, target, watch, tenant, make_request(rng, next(numbers)))

        await asyncio.gather(*(worker(number) for number in range(concurrency)))
        spent = time.monotonic() - began
        at_rest = await _look(client, target, watch)
    for tenant in target.tenants:
        # A check of what is not seen means something only where it could have been seen.
        if not watch.own_marks_seen[tenant]:
            watch.fault(
                f"{tenant} never saw its own words; the mix was too short to prove anything"
            )
    return LoadReport(
        seconds=round(spent, 3),
        concurrency=concurrency,
        requests=sum(map(len, watch.times.values())),
        kinds={kind: _summary(watch, kind) for kind in KINDS if watch.times[kind]},
        at_rest=at_rest,
        faults=watch.faults,
    )


async def _warm(target: LoadTarget, watch: _Watch) -> None:
    """Show the engine the chunks before the load: it stores them when idle, and it will not be idle."""
    headers = {"Authorization": f"Bearer {target.operator_key}"}
    async with httpx.AsyncClient(
        base_url=target.url, timeout=_TIMEOUT_S, trust_env=False
    ) as client:
        for tenant in target.tenants:
            for request in warm_requests():
                await _send(client, target, watch, tenant, request)
        await _rest(client, headers, watch)
        seen, same = -1, 0
        while same < _STEADY_POLLS:
            health = (await client.get("/v1/rag/health", headers=headers)).json()
            chunks = int(health["cache"]["store"].get("chunks_now", 0))
            seen, same = chunks, same + 1 if chunks == seen else 0
            await asyncio.sleep(0.5)


async def _rest(client: httpx.AsyncClient, headers: dict[str, str], watch: _Watch) -> None:
    """Wait until nothing runs; the radix tree is empty then."""
    deadline = time.monotonic() + _REST_S
    while (await client.post("/flush_cache", headers=headers)).status_code != 200:
        if time.monotonic() > deadline:
            watch.fault(f"the server did not come to rest within {_REST_S:.0f} s")
            return
        await asyncio.sleep(0.5)


async def _send(
    client: httpx.AsyncClient, target: LoadTarget, watch: _Watch, tenant: str, request: Request
) -> None:
    headers = {"Authorization": f"Bearer {target.tenants[tenant]}", **request.headers}
    body: dict[str, Any] = {"json": request.body} if request.content is None else {}
    if request.body is None and request.content is None:
        body = {}
    began = time.monotonic()
    try:
        async with client.stream(
            request.method, request.path, headers=headers, content=request.content, **body
        ) as answer:
            if request.drop_after is None or answer.status_code != 200:
                content = await answer.aread()
            else:
                content = await _first_lines(answer, request.drop_after)
            status = answer.status_code
    except httpx.HTTPError as error:
        # A server may close a connection whose oversized body it will not read to the end.
        if request.kind != "oversized":
            watch.fault(f"{request.kind} {request.path}: {type(error).__name__} {error}")
        watch.note(request, type(error).__name__, time.monotonic() - began)
        return
    watch.note(request, str(status), time.monotonic() - began)
    watch.read(tenant, request, status, content)


async def _first_lines(answer: httpx.Response, count: int) -> bytes:
    lines = []
    async for line in answer.aiter_lines():
        lines.append(line)
        if len(lines) >= count:
            break
    return "\n".join(lines).encode()


async def _look(client: httpx.AsyncClient, target: LoadTarget, watch: _Watch) -> dict[str, Any]:
    """Wait until nothing runs, empty the radix tree, and read the accounts."""
    headers = {"Authorization": f"Bearer {target.operator_key}"}
    try:
        await _rest(client, headers, watch)
        info = (await client.get("/server_info", headers=headers)).json()
        health = (await client.get("/v1/rag/health", headers=headers)).json()
    except (httpx.HTTPError, ValueError) as error:
        watch.fault(f"the server does not answer any more: {type(error).__name__} {error}")
        return {}
    if health["status"] != "ok":
        watch.fault(f"health: {'; '.join(health['problems'])}")
    found: dict[str, Any] = {"store": health["cache"]["store"], "counts": health["cache"]["counts"]}
    for number, state in enumerate(info["internal_states"]):
        report = state.get(INTEGRITY_KEY)
        if report is None:
            watch.fault("the server reports no integrity; start it with RAG_PIPELINE_INTEGRITY=on")
            continue
        found.setdefault("integrity", []).append(report)
        if report["store"] != "ok":
            watch.fault(f"chunk cache of scheduler {number}: {report['store']}")
        if report["pool_free"] != report["pool_size"]:
            watch.fault(
                f"KV pool of scheduler {number}: {report['pool_free']} of {report['pool_size']} free"
            )
        if report["requests"]:
            watch.fault(f"scheduler {number} still holds {report['requests']} requests")
    return found


def _summary(watch: _Watch, kind: str) -> dict[str, Any]:
    times = sorted(watch.times[kind])
    return {
        "sent": len(times),
        "status": dict(sorted(watch.statuses[kind].items())),
        "p50_s": round(statistics.median(times), 4),
        "p95_s": round(times[min(len(times) - 1, int(0.95 * len(times)))], 4),
    }
