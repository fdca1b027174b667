"""Random requests to every route, and bytes that are no HTTP: a client's mistake is a 4xx and disturbs nobody."""

from __future__ import annotations

import json
import random
import socket
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import httpx

from rag_eval.benchmarks.load_run import LoadTarget
from rag_eval.benchmarks.load_server import started_server
from rag_eval.reliability.figure import MAX_FAULTS, Outcome, Plan
from rag_eval.reliability.probes import probing

STALL_S = 0.1
_UNTRIED = ("/shutdown", "/pause", "/abort", "/start_profile")
"""Routes that stop, pause or burden the server when they are asked rightly: that is no mistake."""


_FIELDS = (
    "model",
    "messages",
    "prompt",
    "text",
    "query",
    "k",
    "rag",
    "input_ids",
    "max_tokens",
    "sampling_params",
    "n",
    "stop",
    "stream",
    "temperature",
    "logprobs",
    "top_logprobs",
    "return_logprob",
    "top_logprobs_num",
    "logprob_start_len",
    "token_ids_logprob",
    "input_embeds",
    "rid",
    "response_format",
    "tools",
    "logit_bias",
    "seed",
    "extra_key",
    "cache_salt",
    "custom_params",
    "kv_hints",
    "session_params",
    "priority",
    "positional_embed_overrides",
    "image_data",
    "input",
    "documents",
    "items",
    "instances",
    "lora_path",
)
_INNER = (
    "role",
    "content",
    "type",
    "k",
    "max_new_tokens",
    "top_k",
    "top_p",
    "min_p",
    "stop_token_ids",
    "stop_regex",
    "regex",
    "json_schema",
    "n",
    "seed",
    "logit_bias",
    "temperature",
    "rag_spans",
    "rag_mode",
    "id",
    "actions",
)
_PROMPTS: tuple[dict[str, Any], ...] = (
    {"text": "One", "sampling_params": {"max_new_tokens": 1}},
    {"model": "m", "prompt": "One", "max_tokens": 1},
    {"model": "m", "messages": [{"role": "user", "content": "One"}], "max_tokens": 1},
)


def run(plan: Plan) -> Outcome:
    """Full size: 10,000 requests, one in five over a raw socket."""
    outcome, rng = Outcome(), random.Random(plan.seed)
    count = plan.size(10_000, 200)
    if count < 10_000:
        outcome.note = f"{count} of 10,000 requests"
    with started_server(plan.model, plan.folder) as target:
        keys = [target.operator_key, *target.tenants.values(), "wrong", ""]
        routes = _routes(target)
        headers = {"Authorization": f"Bearer {target.operator_key}"}
        with (
            httpx.Client(base_url=target.url, timeout=120, trust_env=False) as client,
            # SGLang's own /health asks the scheduler and looks for its word once per second.
            probing(target.url, "/v1/rag/models", headers) as probe,
        ):
            for _ in range(count):
                if outcome.failed >= MAX_FAULTS:
                    # A server that died answers nothing more, and each request waits for it.
                    outcome.note = f"given up after {outcome.tried} of {count:,} requests"
                    break
                outcome.tried += 1
                if rng.random() < 0.2:
                    _send_raw(target, rng, outcome)
                else:
                    _send(client, rng, routes, rng.choice(keys), outcome)
        for fault in probe.faults:
            outcome.fault(f"beside the load: {fault}")
        outcome.measure("stall_p99_s", probe.share(0.99), STALL_S)
        outcome.measure("stall_max_s", probe.share(1.0))
        try:
            answer = httpx.get(
                f"{target.url}/v1/rag/health", headers=headers, timeout=60, trust_env=False
            )
        except httpx.HTTPError as error:
            outcome.fault(f"in the end the server does not answer: {error!r}")
            return outcome
        if answer.status_code != 200 or answer.json()["status"] != "ok":
            outcome.fault(f"in the end the server is not well: {answer.text[:200]}")
    return outcome


def _routes(target: LoadTarget) -> list[tuple[str, str]]:
    """Every route of the application, stock ones included, by its own list."""
    answer = httpx.get(
        f"{target.url}/openapi.json",
        headers={"Authorization": f"Bearer {target.operator_key}"},
        timeout=60,
        trust_env=False,
    )
    paths = answer.json()["paths"]
    return [
        (method.upper(), path)
        for path, methods in sorted(paths.items())
        if not any(path.startswith(untried) for untried in _UNTRIED)
        for method in sorted(methods)
    ]


def _send(
    client: httpx.Client,
    rng: random.Random,
    routes: list[tuple[str, str]],
    key: str,
    outcome: Outcome,
) -> None:
    method, path = rng.choice(routes)
    path = path.replace("{", "").replace("}", "") + rng.choice(("", "", "?a=%00&a=1", "/..%2f"))
    headers = {
        "content-type": rng.choice(("application/json", "text/plain", "multipart/form-data"))
    }
    if key:
        headers["Authorization"] = f"Bearer {key}"
    try:
        answer = client.request(method, path, content=_body(rng), headers=headers)
    except httpx.HTTPError as error:
        outcome.fault(f"{method} {path}: {type(error).__name__} {error}")
        return
    if answer.status_code >= 500:
        outcome.fault(f"{method} {path}: {answer.status_code} {answer.text[:200]}")


def _body(rng: random.Random) -> bytes:
    kind = rng.randrange(5)
    if kind == 0:
        return rng.randbytes(rng.choice((0, 1, 40, 4000)))
    if kind == 1:
        depth = rng.choice((10, 900, 20_000))
        return b"[" * depth + b"]" * depth
    if kind == 2:
        return rng.choice((b"null", b"NaN", b'"\\ud800"', b"{", b"[1e999]", b'{"a":1,"a":2}'))
    chosen = {name: _value(rng, 0) for name in rng.sample(_FIELDS, rng.randint(1, 4))}
    if rng.random() < 0.5:
        # What is wrong with the rest is seen behind a prompt that is right.
        chosen |= rng.choice(_PROMPTS)
    return json.dumps(chosen).encode()


def _value(rng: random.Random, depth: int) -> Any:
    plain: list[Any] = [
        None,
        True,
        -1,
        0,
        1,
        2**40,
        1e308,
        "",
        "x",
        "\ud800".encode("utf-16", "surrogatepass").hex(),
    ]
    kind = rng.randrange(8)
    if kind == 0 and depth < 3:
        return [_value(rng, depth + 1) for _ in range(rng.randint(0, 3))]
    if kind == 1 and depth < 3:
        return {rng.choice(_INNER): _value(rng, depth + 1) for _ in range(2)}
    return rng.choice(plain)


def _send_raw(target: LoadTarget, rng: random.Random, outcome: Outcome) -> None:
    """Send bytes that break the protocol; whatever is answered must not be a 5xx."""
    host, port = urlsplit(target.url).hostname, urlsplit(target.url).port
    ask = b"POST /v1/rag/search HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    sent = rng.choice(
        (
            rng.randbytes(60),
            b"GET / HTTP/9.9\r\n\r\n",
            b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
            ask + b"Content-Length: -1\r\n\r\n",
            ask + b"Content-Length: 5\r\nContent-Length: 9\r\n\r\n{}{}{}",
            ask + b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n",
            ask + b"Content-Length: 900000\r\n\r\n{",
            ask + b"X: " + b"\xff\x00" * 20 + b"\r\n\r\n",
            b"GET /v1/rag/health HTTP/1.1\r\n\r\n",
        )
    )
    answer = b""
    with suppress(OSError), socket.create_connection((host, port), timeout=5) as connection:
        connection.sendall(sent)
        connection.settimeout(0.2)
        with suppress(TimeoutError):
            answer = connection.recv(200)
    if answer.startswith(b"HTTP/1.") and answer[9:10] == b"5":
        outcome.fault(f"raw {sent[:40]!r}: {answer[:60]!r}")
