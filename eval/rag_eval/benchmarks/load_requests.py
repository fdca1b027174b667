"""The requests of the load test, each with what the server must answer."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ASK, SEARCH, DOCUMENTS = "/v1/rag/chat/completions", "/v1/rag/search", "/v1/rag/documents"

KINDS: Mapping[str, float] = {
    "fused": 0.30,
    "ordinary": 0.15,
    "aborted": 0.15,
    "malformed": 0.20,
    "oversized": 0.05,
    "search": 0.10,
    "upload": 0.03,
    "delete": 0.02,
}
"""Share of each kind."""

_QUESTIONS = (
    "What does the with statement do?",
    "How are lambda expressions written?",
    "When does a while loop end?",
    "What does import bind?",
    "Which exceptions may be raised?",
    "How are names resolved?",
)
_POLICIES = ("query", "query:0.3", "epic", "cacheblend", "reuse", "prefix", "full")


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One request of the mix.

    Parameters
    ----------
    kind : str
        One of :data:`KINDS`.
    method, path, body, content, headers : str, str, object, bytes or None, mapping of str to str
        As sent; `content` wins over `body`.
    expected : tuple of int
        Statuses that are right.
    drop_after : int or None
        Events after which the connection is closed; None reads to the end.
    """

    kind: str
    method: str
    path: str
    body: Any = None
    content: bytes | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    expected: tuple[int, ...] = (200,)
    drop_after: int | None = None


def make_request(rng: random.Random, number: int) -> Request:
    """Draw one request of the mix."""
    kind = rng.choices(tuple(KINDS), tuple(KINDS.values()))[0]
    return _MAKERS[kind](rng, number)


def warm_requests() -> list[Request]:
    """One fused request per question: all chunks that the mix will ask for."""
    rng = random.Random(0)
    asked = []
    for question in _QUESTIONS:
        body = _chat(rng) | {"messages": [{"role": "user", "content": question}], "max_tokens": 1}
        body["rag"] = {"k": 6, "policy": "query", "search": "bm25"}
        asked.append(Request(kind="fused", method="POST", path=ASK, body=body))
    return asked


def _chat(rng: random.Random, **more: Any) -> dict[str, Any]:
    rag = {"k": rng.randint(1, 6), "policy": rng.choice(_POLICIES), "search": "bm25"}
    return {
        "messages": [{"role": "user", "content": rng.choice(_QUESTIONS)}],
        "max_tokens": rng.randint(1, 24),
        "rag": rag,
        **more,
    }


def _fused(rng: random.Random, number: int) -> Request:
    stream = rng.random() < 0.5
    options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    return Request(kind="fused", method="POST", path=ASK, body=_chat(rng, **options))


def _ordinary(rng: random.Random, number: int) -> Request:
    body = {
        "model": "any",
        "messages": [{"role": "user", "content": f"{rng.choice(_QUESTIONS)} {number % 17}"}],
        "max_tokens": rng.randint(1, 24),
    }
    return Request(kind="ordinary", method="POST", path="/v1/chat/completions", body=body)


def _aborted(rng: random.Random, number: int) -> Request:
    body = _chat(rng, stream=True) | {"max_tokens": 400, "temperature": 1.0}
    return Request(kind="aborted", method="POST", path=ASK, body=body, drop_after=rng.randint(0, 6))


def _search(rng: random.Random, number: int) -> Request:
    search = rng.choice(("bm25", "dense", "hybrid"))
    body = {"query": rng.choice(_QUESTIONS), "k": rng.randint(1, 20), "search": search}
    return Request(kind="search", method="POST", path=SEARCH, body=body)


def _upload(rng: random.Random, number: int) -> Request:
    text = f"# Note {number % 5}\n\nThis note number {number} says nothing of interest."
    body = {"documents": [{"name": f"note-{number % 5}.md", "text": text}]}
    # 429: this tenant has too many uploads under way, which is an answer and not a fault.
    return Request(kind="upload", method="POST", path=DOCUMENTS, body=body, expected=(202, 429))


def _delete(rng: random.Random, number: int) -> Request:
    path = f"{DOCUMENTS}/uploads/note-{rng.randint(0, 4)}.md"
    return Request(kind="delete", method="DELETE", path=path, expected=(200, 400, 404))


def _oversized(rng: random.Random, number: int) -> Request:
    if rng.random() < 0.5:
        body = _chat(rng) | {"messages": [{"role": "user", "content": "many words " * 15_000}]}
        return Request(kind="oversized", method="POST", path=ASK, body=body, expected=(400, 413))
    return Request(
        kind="oversized",
        method="POST",
        path=rng.choice((ASK, SEARCH)),
        content=b"x" * (2 << 20),
        headers={"Content-Type": "application/json"},
        expected=(413,),
    )


def _hints(payload: Any, **action: Any) -> dict[str, Any]:
    given = {
        "action_id": "a",
        "action_type": "rag.fusion",
        "action_version": "1",
        "payload": payload,
        **action,
    }
    return {"protocol_version": "1", "message_id": "m", "actions": [given]}


def malformed_requests() -> list[tuple[str, Any]]:
    """Paths and bodies, each with one mistake that must be refused with 400 and one line."""
    chat: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}
    native = {"input_ids": list(range(100, 160)), "sampling_params": {"max_new_tokens": 1}}
    return [
        (ASK, {}),
        (ASK, {"messages": "hello"}),
        (ASK, {"messages": [{"role": "user"}]}),
        (ASK, {**chat, "rag": {"k": -1}}),
        (ASK, {**chat, "rag": {"k": 10**9}}),
        (ASK, {**chat, "rag": {"policy": "no-such"}}),
        (ASK, {**chat, "rag": {"ratio": "half"}}),
        (ASK, {**chat, "rag": {"index": "../other"}}),
        (ASK, {**chat, "rag": {"where": {"$bad": 1}}}),
        (ASK, {**chat, "max_tokens": 10**9}),
        (ASK, {**chat, "temperature": "hot"}),
        (ASK, {**chat, "unknown": True}),
        (SEARCH, {"query": ""}),
        (SEARCH, {"query": 7}),
        (SEARCH, {"query": "x", "k": 0}),
        (SEARCH, {"query": "x", "index": "another-tenants"}),
        (DOCUMENTS, {"documents": []}),
        (DOCUMENTS, {"documents": [{"name": "../../x.txt", "text": "x"}]}),
        ("/generate", {**native, "kv_hints": _hints({"spans": [[10, 5]]})}),
        ("/generate", {**native, "kv_hints": _hints({"spans": [[0, 10_000]]})}),
        ("/generate", {**native, "kv_hints": _hints({"mode": "steal"})}),
        ("/generate", {**native, "kv_hints": _hints({"policy": "no-such"})}),
        ("/generate", {**native, "kv_hints": _hints({}, action_version="99")}),
        (
            "/generate",
            {**native, "sampling_params": {"custom_params": {"rag_spans": [1, 2, 3]}}},
        ),
        ("/generate", {**native, "sampling_params": {"custom_params": {"rag_ratio": 2}}}),
    ]


_MALFORMED = malformed_requests()
_BROKEN = (b"{", b"", b"\xff\xfe\x00", b"[" * 50_000, b'{"messages": NaN}', b"null")


def _malformed(rng: random.Random, number: int) -> Request:
    if rng.random() < 0.2:
        return Request(
            kind="malformed",
            method="POST",
            path=rng.choice((ASK, SEARCH, DOCUMENTS)),
            content=rng.choice(_BROKEN),
            headers={"Content-Type": "application/json"},
            expected=(400,),
        )
    path, body = rng.choice(_MALFORMED)
    # A known path with a name that this key has not is 404; an upload may first meet the queue's limit.
    return Request(kind="malformed", method="POST", path=path, body=body, expected=(400, 404, 429))


_MAKERS = {
    "fused": _fused,
    "ordinary": _ordinary,
    "aborted": _aborted,
    "malformed": _malformed,
    "oversized": _oversized,
    "search": _search,
    "upload": _upload,
    "delete": _delete,
}


def refusal_line(content: bytes) -> str | None:
    """The one line of a refusal in any of the server's shapes; None where there is not exactly one."""
    try:
        body = json.loads(content)
    except ValueError:
        return None
    error = body.get("error", body) if isinstance(body, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    if not isinstance(message, str) or not message.strip() or "\n" in message.strip():
        return None
    return message
