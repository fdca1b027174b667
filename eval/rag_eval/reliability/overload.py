"""Ten times more callers than the server admits: the excess is refused at once, the admitted and health stay quick."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass, field

import aiohttp

from rag_eval.benchmarks.load_requests import ASK, SEARCH
from rag_eval.benchmarks.load_run import LoadTarget
from rag_eval.benchmarks.load_server import started_server
from rag_eval.reliability.figure import Outcome, Plan
from rag_eval.reliability.probes import probing

REFUSAL_S, HEALTH_S, SLOWDOWN = 0.1, 1.0, 2.0
_CAPACITY = 8
"""Callers who search, and callers who ask, that just fill the server's queues with one request each."""
_QUEUES = {"--max-searches": _CAPACITY, "--max-questions": _CAPACITY}
_SPREAD_S = 1.0
_REFUSED = (429, 503)


@dataclass(kw_only=True, slots=True)
class _Seen:
    admitted: dict[str, list[float]] = field(default_factory=lambda: {SEARCH: [], ASK: []})
    refused: list[float] = field(default_factory=list)
    others: list[str] = field(default_factory=list)


def run(plan: Plan) -> Outcome:
    """Full size: 10 minutes of ten times the capacity, after one minute at capacity."""
    outcome = Outcome()
    seconds = plan.size(600, 15)
    outcome.note = f"{seconds} s of overload" if seconds < 600 else ""
    flags = [word for name, value in _QUEUES.items() for word in (name, str(value))]
    with started_server(plan.model, plan.folder, flags) as target:
        headers = {"Authorization": f"Bearer {target.operator_key}"}
        # What each tenant's questions need is in the chunk cache then, as it is under the overload.
        asyncio.run(_load(target, len(target.tenants), 10.0, plan.seed))
        quiet = asyncio.run(_load(target, _CAPACITY, max(15.0, seconds / 10), plan.seed))
        with probing(target.url, "/v1/rag/health", headers) as probe:
            crowd = asyncio.run(_load(target, 10 * _CAPACITY, float(seconds), plan.seed))
    admitted = sum(map(len, crowd.admitted.values()))
    outcome.tried = admitted + len(crowd.refused) + len(crowd.others)
    for other in [*quiet.others, *crowd.others, *probe.faults]:
        outcome.fault(other)
    if quiet.refused:
        outcome.fault(f"{len(quiet.refused)} requests were refused at capacity")
    for path in (SEARCH, ASK):
        if not (quiet.admitted[path] and crowd.admitted[path]):
            outcome.fault(f"{path}: none was admitted at capacity, or none under overload")
    if not crowd.refused:
        outcome.fault("nothing was refused at ten times capacity")
    outcome.measure("refusal_p99_s", _quantile(crowd.refused, 0.99), REFUSAL_S)
    outcome.measure("refusal_max_s", _quantile(crowd.refused, 1.0))
    outcome.measure("health_p99_s", probe.share(0.99), HEALTH_S)
    for path, times in crowd.admitted.items():
        calm = _quantile(quiet.admitted[path], 0.99)
        name = "search" if path == SEARCH else "ask"
        outcome.measure(f"{name}_p99_at_capacity_s", calm)
        outcome.measure(f"{name}_p99_overloaded_s", _quantile(times, 0.99))
        if calm and times:
            outcome.measure(f"{name}_slowdown", _quantile(times, 0.99) / calm, SLOWDOWN)
    outcome.worst["admitted"], outcome.worst["refused"] = admitted, len(crowd.refused)
    return outcome


async def _load(target: LoadTarget, callers: int, seconds: float, seed: int) -> _Seen:
    """Let so many callers search and as many ask, one thing after another; half of each are a tenant's."""
    seen, until = _Seen(), time.monotonic() + seconds
    keys = list(target.tenants.values())

    async def caller(path: str, number: int) -> None:
        rng = random.Random(f"{seed}-{number}")
        headers = {"Authorization": f"Bearer {keys[number % len(keys)]}"}
        await asyncio.sleep(rng.uniform(0, _SPREAD_S))
        while time.monotonic() < until:
            await _call(session, path, headers, rng, seen)

    # Of the clients at hand this one leaves most of a small machine to the server.
    async with aiohttp.ClientSession(
        base_url=target.url,
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=300),
    ) as session:
        await asyncio.gather(*(caller(path, n) for path in (SEARCH, ASK) for n in range(callers)))
    return seen


async def _call(
    session: aiohttp.ClientSession,
    path: str,
    headers: dict[str, str],
    rng: random.Random,
    seen: _Seen,
) -> None:
    question = f"What does import bind, case {rng.randint(1, 50)}?"
    body: dict[str, object] = {"query": question, "k": 3}
    if path == ASK:
        body = {"messages": [{"role": "user", "content": question}], "max_tokens": 8}
    began = time.monotonic()
    try:
        async with session.post(path, json=body, headers=headers) as answer:
            said, status = await answer.text(), answer.status
            retry_s = answer.headers.get("retry-after")
    except (aiohttp.ClientError, TimeoutError) as error:
        seen.others.append(f"{path}: {type(error).__name__} {error}")
        return
    took = time.monotonic() - began
    if status == 200:
        seen.admitted[path].append(took)
    elif status in _REFUSED and retry_s:
        seen.refused.append(took)
        # As clients do: all of them at the same moment would be a wave, and the next one too.
        await asyncio.sleep(float(retry_s) + rng.uniform(0, _SPREAD_S))
    else:
        seen.others.append(f"{path}: {status} {said[:200]}")


def _quantile(times: list[float], part: float) -> float:
    ordered = sorted(times)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))] if ordered else 0.0
