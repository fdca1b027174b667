"""One tenant looks for traces of another: in texts, usage, health, metrics, and in how long an answer takes."""

from __future__ import annotations

import json
import random
import time
from typing import Any

import httpx

from rag_eval.benchmarks.load_requests import ASK, SEARCH
from rag_eval.benchmarks.load_run import LoadTarget
from rag_eval.benchmarks.load_server import started_server
from rag_eval.reliability.figure import Outcome, Plan

AUC = 0.55
_OPERATOR_ONLY = ("/metrics", "/server_info", "/get_server_info", "/v1/loads")


def run(plan: Plan) -> Outcome:
    """Full size: 10,000 probes, of which 1,000 are timed."""
    outcome, rng = Outcome(), random.Random(plan.seed)
    count, timed = plan.size(10_000, 60), plan.size(1_000, 20)
    if count < 10_000:
        outcome.note = f"{count} of 10,000 probes, {timed} of 1,000 timed"
    with (
        started_server(plan.model, plan.folder) as target,
        httpx.Client(base_url=target.url, timeout=120, trust_env=False) as client,
    ):
        for tenant in target.tenants:
            _ask(client, target, tenant, _own(target, tenant))
        for number in range(count - timed):
            outcome.tried += 1
            _probe(client, target, rng, number, outcome)
        known, unknown = _timed(client, target, rng, timed, outcome)
    auc = _auc(known, unknown)
    outcome.measure("timing_auc", max(auc, 1 - auc), AUC if timed >= 200 else None)
    outcome.worst["timed"] = len(known) + len(unknown)
    return outcome


def _own(target: LoadTarget, tenant: str) -> str:
    return f"Tell me about {target.marks[tenant]} and import."


def _ask(client: httpx.Client, target: LoadTarget, tenant: str, text: str) -> httpx.Response:
    body: dict[str, Any] = {"messages": [{"role": "user", "content": text}], "max_tokens": 4}
    body["rag"] = {"k": 3, "policy": "query"}
    return client.post(
        ASK, json=body, headers={"Authorization": f"Bearer {target.tenants[tenant]}"}
    )


def _probe(
    client: httpx.Client, target: LoadTarget, rng: random.Random, number: int, outcome: Outcome
) -> None:
    spy, owner = rng.sample(tuple(target.tenants), 2)
    headers = {"Authorization": f"Bearer {target.tenants[spy]}"}
    kind = rng.choice(("search", "ask", "health", "figures", "usage"))
    allowed: tuple[int, ...] = (200,)
    if kind == "search":
        answer = client.post(SEARCH, json={"query": target.marks[owner], "k": 5}, headers=headers)
    elif kind == "ask":
        answer = _ask(client, target, spy, f"{_own(target, owner)} {number}")
    elif kind == "health":
        answer = client.get("/v1/rag/health", headers=headers)
        _no_foreign_figures(answer, outcome)
    elif kind == "figures":
        answer, allowed = client.get(rng.choice(_OPERATOR_ONLY), headers=headers), (401, 403, 404)
    else:
        answer = _usage(client, target, spy, owner, headers, outcome)
    if answer.status_code not in allowed:
        outcome.fault(f"{kind}: status {answer.status_code} {answer.text[:200]}")
    # The spy's own question comes back in some answers; the owner's documents hold the mark's title.
    if kind in ("search", "health") and target.marks[owner] in answer.text:
        outcome.fault(f"{kind}: {spy} saw a word of {owner}'s documents: {answer.text[:200]}")
    if kind == "ask" and answer.status_code == 200:
        cited = json.dumps(answer.json().get("rag", {}).get("citations", []))
        if target.marks[owner] in cited:
            outcome.fault(f"ask: {spy} was given {owner}'s documents")


def _no_foreign_figures(answer: httpx.Response, outcome: Outcome) -> None:
    """A tenant's health names no figure of the whole engine."""
    text = answer.text
    for name in ("chunks_now", "bytes_now", "misses", "evictions"):
        if name in text:
            outcome.fault(f"health shows a tenant the engine's {name}")
            return


def _usage(
    client: httpx.Client,
    target: LoadTarget,
    spy: str,
    owner: str,
    headers: dict[str, str],
    outcome: Outcome,
) -> httpx.Response:
    """Ask what the owner asked; no token of it may count as cached behind the shared beginning."""
    answer = _ask(client, target, spy, _own(target, owner))
    if answer.status_code == 200:
        details = answer.json()["usage"].get("prompt_tokens_details") or {}
        # The spy's own documents and system part may be its own hits: the owner's question may not.
        reused = int(details.get("reused_tokens") or 0) + int(details.get("cached_tokens") or 0)
        if reused >= int(answer.json()["usage"]["prompt_tokens"]):
            outcome.fault("usage: a foreign prompt counts as cached to its last token")
    return answer


def _timed(
    client: httpx.Client, target: LoadTarget, rng: random.Random, count: int, outcome: Outcome
) -> tuple[list[float], list[float]]:
    """Waits for prompts that the other tenant has just sent, and for prompts that nobody has."""
    known: list[float] = []
    unknown: list[float] = []
    spy, owner = tuple(target.tenants)
    words = ("record", "valley", "copper", "lantern", "orbit", "meadow", "signal", "harbour")
    for number in range(count):
        outcome.tried += 1
        prompt = f"{number} " + " ".join(rng.choice(words) for _ in range(120))
        is_known = rng.random() < 0.5
        other = (
            prompt if is_known else f"{number} " + " ".join(rng.choice(words) for _ in range(120))
        )
        # The owner works in both cases, so that the machine is in the same state.
        _generate(client, target, owner, other)
        began = time.monotonic()
        answer = _generate(client, target, spy, prompt)
        (known if is_known else unknown).append(time.monotonic() - began)
        if answer.status_code != 200:
            outcome.fault(f"completions: status {answer.status_code} {answer.text[:200]}")
            continue
        details = answer.json()["usage"].get("prompt_tokens_details") or {}
        if int(details.get("cached_tokens") or 0) > 40:
            outcome.fault("usage: a prompt that only the other tenant has sent was cached")
    return known, unknown


def _generate(client: httpx.Client, target: LoadTarget, tenant: str, prompt: str) -> httpx.Response:
    headers = {"Authorization": f"Bearer {target.tenants[tenant]}"}
    body = {"model": "default", "max_tokens": 1, "messages": [{"role": "user", "content": prompt}]}
    return client.post("/v1/chat/completions", json=body, headers=headers)


def _auc(one: list[float], two: list[float]) -> float:
    """Chance that a random value of `one` is below a random value of `two`; ties count half."""
    if not one or not two:
        return 0.5
    below = sum((a < b) + 0.5 * (a == b) for a in one for b in two)
    return below / (len(one) * len(two))
