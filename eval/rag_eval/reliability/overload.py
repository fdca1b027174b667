"""Ten times more callers than the server admits: the excess is refused at once, the admitted and health stay quick."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass, field

import httpx

from rag_eval.benchmarks.load_requests import ASK, SEARCH
from rag_eval.benchmarks.load_run import LoadTarget
from rag_eval.benchmarks.load_server import started_server
from rag_eval.reliability.figure import Outcome, Plan
from rag_eval.reliability.probes import probing

REFUSAL_S, HEALTH_S, SLOWDOWN = 0.1, 1.0, 2.0
_QUIET, _CROWD = 4, 400
"""Callers at capacity, and ten times what the server's queues hold."""
_REFUSED = (429, 503)


@dataclass(kw_only=True, slots=True)
class _Seen:
    admitted: dict[str, list[float]] = field(default_factory=lambda: {SEARCH: [], ASK: []})
    refused: list[float] = field(default_factory=list)
    others: list[str] = field(default_factory=list)


def run(plan: Plan) -> Outcome:
    """Full size: 10 minutes with 400 callers, after one minute at capacity."""
    outcome = Outcome()
    seconds = plan.size(600, 15)
    outcome.note = f"{seconds} s of overload" if seconds < 600 else ""
    with started_server(plan.model, plan.folder) as target:
        headers = {"Authorization": f"Bearer {target.operator_key}"}
        quiet = asyncio.run(_load(target, _QUIET, max(5.0, seconds / 10), plan.seed))
        with probing(target.url, "/health", headers) as probe:
            crowd = asyncio.run(_load(target, _CROWD, float(seconds), plan.seed))
    admitted = sum(map(len, crowd.admitted.values()))
    outcome.tried = admitted + len(crowd.refused) + len(crowd.others)
    for other in [*quiet.others, *crowd.others, *probe.faults]:
        outcome.fault(other)
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
        if calm:
            outcome.measure(f"{name}_slowdown", _quantile(times, 0.99) / calm, SLOWDOWN)
    outcome.worst["admitted"], outcome.worst["refused"] = admitted, len(crowd.refused)
    return outcome


async def _load(target: LoadTarget, callers: int, seconds: float, seed: int) -> _Seen:
    seen, until = _Seen(), time.monotonic() + seconds
    limits = httpx.Limits(max_connections=callers)
    async with httpx.AsyncClient(
        base_url=target.url, timeout=300, limits=limits, trust_env=False
    ) as client:

        async def caller(number: int) -> None:
            rng = random.Random(f"{seed}-{number}")
            while time.monotonic() < until:
                await _call(client, target, rng, seen)

        await asyncio.gather(*(caller(number) for number in range(callers)))
    return seen


async def _call(
    client: httpx.AsyncClient, target: LoadTarget, rng: random.Random, seen: _Seen
) -> None:
    key = target.tenants[rng.choice(tuple(target.tenants))]
    question = f"What does import bind, case {rng.randint(1, 50)}?"
    path, body = SEARCH, {"query": question, "k": 3}
    if rng.random() < 0.3:
        path = ASK
        body = {"messages": [{"role": "user", "content": question}], "max_tokens": 8}
    began = time.monotonic()
    try:
        answer = await client.post(path, json=body, headers={"Authorization": f"Bearer {key}"})
    except httpx.HTTPError as error:
        seen.others.append(f"{path}: {type(error).__name__} {error}")
        return
    took = time.monotonic() - began
    if answer.status_code == 200:
        seen.admitted[path].append(took)
    elif answer.status_code in _REFUSED and answer.headers.get("retry-after"):
        seen.refused.append(took)
        # As a client should; a tenth of the wait, or the crowd would be none.
        await asyncio.sleep(min(1.0, float(answer.headers["retry-after"]) / 10))
    else:
        seen.others.append(f"{path}: {answer.status_code} {answer.text[:200]}")


def _quantile(times: list[float], part: float) -> float:
    ordered = sorted(times)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))] if ordered else 0.0
