"""Every route behind the guard, and what passes it: bodies, ids, the log, a server that stops."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from guarded import (
    OPERATOR,
    OWN,
    TENANT,
    ask,
    bearer,
    guard,
    one_line,
    reached,
    sglang_app,
)

from rag_eval.benchmarks.route_matrix import MatrixTarget, run_matrix
from rag_pipeline.server.access import ROUTES, Access
from rag_pipeline.server.request_log import logger

# -- every route --------------------------------------------------------------------------------


@pytest.mark.engine
def test_every_route_of_the_real_app_is_in_a_list() -> None:
    from fastapi.routing import iter_route_contexts
    from sglang.srt.utils.auth import AuthLevel

    from rag_pipeline.server.cache_routes import make_cache_router
    from rag_pipeline.server.page import make_page_router
    from rag_pipeline.server.routes import make_router

    routes = [
        *sglang_app().router.routes,
        *make_router(None).routes,  # type: ignore[arg-type]
        *make_cache_router(None).routes,  # type: ignore[arg-type]
        *make_page_router().routes,
    ]
    found: dict[str, set[Any]] = {}
    for route in iter_route_contexts(routes):
        level = getattr(route.endpoint, "_auth_level", AuthLevel.NORMAL)
        found.setdefault(str(route.path), set()).add(level)
    assert set(found) | {"/metrics"} == set(ROUTES)  # it is added when SGLang starts with metrics
    for path, levels in found.items():
        if not path.startswith("/v1/rag/cache"):  # ours have no level of SGLang: the guard decides
            assert (ROUTES[path] is Access.ADMIN) == (levels != {AuthLevel.NORMAL}), path


def test_the_documentation_has_the_same_lists() -> None:
    text = (Path(__file__).parents[2] / "docs" / "security.md").read_text("utf-8")
    rows = re.findall(
        r"^\| (nothing|any key|the operator's key|the administrator's key)[^|]*\| (.+) \|$",
        text,
        re.M,
    )
    named = dict(
        zip(
            ("nothing", "any key", "the operator's key", "the administrator's key"),
            Access,
            strict=True,
        )
    )
    listed = {path: named[who] for who, paths in rows for path in re.findall(r"`([^`]+)`", paths)}
    assert listed == ROUTES


@pytest.mark.parametrize("key", [OPERATOR, None])
def test_the_route_matrix_has_no_unlisted_answer(key: str | None) -> None:
    target = MatrixTarget(url=OWN, operator_key=key, tenant_key=TENANT if key else None)

    async def run() -> Any:
        transport = httpx.ASGITransport(guard(key=key), client=("127.0.0.1", 5))
        async with httpx.AsyncClient(transport=transport) as client:
            return await run_matrix(client, target, reach=lambda cell: True)

    report = asyncio.run(run())
    assert report.failed == 0, report.to_json()
    assert report.tried == len(ROUTES) * 2 * 4 * (5 if key else 3)


def test_the_matrix_finds_a_guard_that_is_missing() -> None:
    async def run() -> Any:
        async def open_app(scope: Any, receive: Any, send: Any) -> None:
            scope["state"] = {"rag_tenant": None}
            await reached(scope, receive, send)

        transport = httpx.ASGITransport(open_app)
        async with httpx.AsyncClient(transport=transport) as client:
            return await run_matrix(client, MatrixTarget(url=OWN, operator_key=OPERATOR))

    assert len(asyncio.run(run()).unlisted_answers) > 1000


# -- bodies, ids, the log, stopping -------------------------------------------------------------


def test_every_body_is_bounded_whatever_its_header_says() -> None:
    app = guard(max_body_bytes=1000, body_limits={"/v1/rag/documents": 5000})

    def status(path: str, size: int, *, chunked: bool) -> int:
        async def pieces() -> Any:
            for _ in range(size // 100):
                yield b"x" * 100

        content = pieces() if chunked else b"x" * size
        answer = ask(app, path, method="POST", content=content, headers=bearer(OPERATOR))
        assert answer.status_code == 200 or one_line(answer)
        return answer.status_code

    for chunked in (True, False):
        assert status("/generate", 1000, chunked=chunked) == 200
        assert status("/generate", 1100, chunked=chunked) == 413
        assert status("/v1/rag/documents", 5000, chunked=chunked) == 200
        assert status("/v1/rag/documents", 5100, chunked=chunked) == 413
        assert status("/v1/rag/search", 1 << 20, chunked=chunked) == 200
        assert status("/v1/rag/search", (1 << 20) + 100, chunked=chunked) == 413


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[dict[str, Any]]]]:
    propagates, logger.propagate = logger.propagate, True
    with caplog.at_level("INFO", logger=logger.name):
        yield lambda: [json.loads(record.message) for record in caplog.records]
    logger.propagate = propagates


def test_a_request_has_an_id_and_one_line(lines: Callable[[], list[dict[str, Any]]]) -> None:
    named = {**bearer(TENANT), "X-Request-Id": "trace-17:a"}
    answer = ask(guard(), "/v1/rag/search", method="POST", headers=named, content=b"four")
    assert answer.headers["x-request-id"] == "trace-17:a"
    ask(guard(), "/generate", headers=bearer(OPERATOR))  # SGLang's routes have its own log
    refused = ask(guard(), "/generate?secret=1", headers={"X-Request-Id": 'x" onload="\x07'})
    assert re.fullmatch("[0-9a-f]{32}", refused.headers["x-request-id"])
    first, second = lines()
    assert first["request_id"] == "trace-17:a"
    assert (first["tenant"], first["route"], first["status"]) == ("acme", "/v1/rag/search", 200)
    assert (first["method"], first["bytes_in"]) == ("POST", 4)
    assert second["status"] == 401
    assert second["refused"]
    assert TENANT not in json.dumps([first, second])
    assert "secret" not in json.dumps([first, second])


def test_a_stopping_server_takes_no_more_and_says_when() -> None:
    app = guard()
    app.stopping = True
    for path in ("/v1/rag/search", "/generate", "/health", "/ready"):
        answer = ask(app, path, headers=bearer(OPERATOR))
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) > 0
        assert answer.headers["connection"] == "close"


def test_a_refusal_for_want_of_room_says_when_to_come_back() -> None:
    async def full(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 503, "headers": []})
        await send({"type": "http.response.body", "body": b"The request queue is full."})

    assert ask(guard(full), headers=bearer(OPERATOR)).headers["retry-after"] == "1"
