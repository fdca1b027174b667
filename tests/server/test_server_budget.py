"""Requests and bytes of bodies under way: bounded in all and by key, and given back on every path."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from guarded import OPERATOR, TENANT, guard, tenants

from rag_pipeline.server import ServerSettings
from rag_pipeline.server.errors import ApiError
from rag_pipeline.server.guard import Guard

PIECE = b"x" * 100
ASK = "/v1/rag/chat/completions"
UNDER_WAY: set[asyncio.Future[None]] = set()
"""A loop holds its tasks weakly: one that nobody holds is collected, and its client is gone."""


class Client:
    """One request, piece by piece."""

    def __init__(
        self, app: Guard, *, key: str = TENANT, path: str = "/generate", length: int | None = None
    ) -> None:
        headers = [(b"host", b"127.0.0.1"), (b"authorization", f"Bearer {key}".encode())]
        if length is not None:
            headers.append((b"content-length", str(length).encode()))
        self.scope = {"type": "http", "method": "POST", "path": path, "headers": headers}
        self.to_app: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.said: list[dict[str, Any]] = []
        self.task = asyncio.ensure_future(app(self.scope, self.to_app.get, self._send))
        UNDER_WAY.add(self.task)

    async def _send(self, message: Any) -> None:
        self.said.append(message)

    async def give(self, *pieces: bytes, end: bool = False) -> Client:
        for piece in pieces:
            self.to_app.put_nowait({"type": "http.request", "body": piece, "more_body": True})
        if end:
            self.to_app.put_nowait({"type": "http.request", "body": b"", "more_body": False})
        for _ in range(200):  # as far as it gets: turns of the loop, which a slow machine has too
            await asyncio.sleep(0)
        return self

    async def leave(self) -> None:
        self.to_app.put_nowait({"type": "http.disconnect"})
        await asyncio.wait({self.task})

    @property
    def status(self) -> int:
        return int(self.said[0]["status"]) if self.said else 0

    @property
    def refused(self) -> bool:
        """Whether the answer is one line with its status, and when to come again."""
        error = json.loads(self.said[-1]["body"])["error"]
        headers = dict(self.said[0]["headers"])
        return error["code"] == self.status and int(headers[b"retry-after"]) > 0


async def read_and_wait(scope: Any, receive: Any, send: Any) -> None:
    """Reads the body and answers with a stream that ends when the client goes."""
    message = await receive()
    while message.get("more_body"):
        message = await receive()
    if message["type"] == "http.disconnect":
        raise ConnectionError("gone")
    await send({"type": "http.response.start", "status": 200, "headers": []})
    if scope["path"] == ASK:
        await send({"type": "http.response.body", "body": b"searched", "more_body": True})
    if scope["path"] == "/generate":
        await send({"type": "http.response.body", "body": b"first", "more_body": True})
    await receive()
    raise RuntimeError("the stream broke")


def run(test: Callable[[Guard], Any], **rules: Any) -> None:
    async def start() -> None:
        UNDER_WAY.clear()  # of a test that failed, on a loop that is closed
        app = guard(read_and_wait, **{"max_requests": 4, "max_held_bytes": 800, **rules})
        await test(app)
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        # Those that have failed are asked too: an exception that nobody asked for is told when it is collected,
        # in the middle of whatever runs then, and CPython 3.11 fails where that is the parsing of source.
        await asyncio.gather(*tasks, *UNDER_WAY, return_exceptions=True)
        UNDER_WAY.clear()
        assert app.budget.used == (0, 0)
        assert app.budget.questions == 0
        assert app.in_flight == 0

    asyncio.run(start())


def test_a_key_has_half_of_the_requests_and_health_is_answered_all_the_same() -> None:
    async def test(app: Guard) -> None:
        held = [await Client(app).give() for _ in range(2)]
        third = await Client(app).give()
        assert (third.status, third.refused) == (429, True)
        held += [await Client(app, key=OPERATOR).give() for _ in range(2)]
        one_more = await Client(app, key=OPERATOR).give()
        assert (one_more.status, one_more.refused) == (429, True)
        for path in ("/health", "/ready", "/v1/rag/health"):
            assert (await Client(app, path=path).give(end=True)).status == 200
        await held[0].leave()
        assert (await Client(app).give(end=True)).status == 200

    run(test)


def test_a_body_that_has_no_room_is_not_received() -> None:
    async def test(app: Guard) -> None:
        await Client(app, length=300).give(PIECE)
        second = await Client(app, length=200).give()
        assert (second.status, second.refused) == (429, True)
        await Client(app, key=OPERATOR, length=400).give()
        assert app.budget.used == (2, 700)
        assert (await Client(app, length=100).give()).status == 0

    run(test)


def test_without_tenants_there_are_no_shares_and_a_full_server_is_503() -> None:
    async def test(app: Guard) -> None:
        await Client(app, length=800).give()
        second = await Client(app, length=1).give()
        assert (second.status, second.refused) == (503, True)

    run(test, tenants=type(tenants())({}, operator_key=TENANT))


def test_a_body_without_a_length_is_counted_as_it_comes() -> None:
    async def test(app: Guard) -> None:
        first = await Client(app).give(*[PIECE] * 3)
        assert app.budget.used == (1, 300)
        second = await Client(app).give(PIECE, PIECE)
        assert (second.status, second.refused) == (429, True)
        assert app.budget.used == (1, 300)
        await first.give(end=True)
        assert first.status == 200

    run(test)


def test_a_stream_gives_the_body_back_with_its_first_byte() -> None:
    async def test(app: Guard) -> None:
        streaming = await Client(app, length=400).give(*[PIECE] * 4, end=True)
        assert streaming.said[-1]["body"] == b"first"
        assert app.budget.used == (1, 0)
        begun = await Client(app, path="/v1/completions", length=400).give(*[PIECE] * 4, end=True)
        assert begun.status == 200
        assert app.budget.used == (2, 400)  # a response without a byte may not have read its prompt

    run(test)


@pytest.mark.parametrize("sent", [0, 2, 4])
def test_whoever_goes_gives_everything_back(sent: int) -> None:
    async def test(app: Guard) -> None:
        for ended in (False, True):
            client = await Client(app, length=400).give(*[PIECE] * sent, end=ended)
            await client.leave()  # the route fails, as a route does whose client has gone
            assert client.task.exception() is not None
            assert app.budget.used == (0, 0)

    run(test)


def test_a_question_without_a_place_is_refused_before_it_searches_and_each_gives_its_place_back() -> (
    None
):
    async def test(app: Guard) -> None:
        held = [await Client(app, path=ASK).give(end=True) for _ in range(2)]
        assert [client.said[-1]["body"] for client in held] == [b"searched"] * 2
        third = await Client(app, path=ASK).give(end=True)
        assert (third.status, third.refused) == (429, True)
        other = await Client(app, key=OPERATOR, path=ASK).give(end=True)
        assert other.status == 200
        # A search is none, and the share of questions is not used up by it.
        assert (await Client(app, path="/v1/rag/search").give(end=True)).status == 200
        await held[0].leave()
        assert app.budget.questions == 2
        assert (await Client(app, path=ASK).give(end=True)).status == 200
        other.task.cancel()
        await asyncio.wait({other.task})
        assert app.budget.questions == 2

    run(test, max_requests=20, max_questions=4)


def test_a_question_takes_its_place_when_its_body_has_come() -> None:
    async def test(app: Guard) -> None:
        sending = [await Client(app, path=ASK, length=100).give(PIECE[:50]) for _ in range(3)]
        assert app.budget.questions == 0
        quick = [await Client(app, path=ASK).give(end=True) for _ in range(2)]
        assert [client.status for client in quick] == [200, 200]
        # Its place has gone while it was being sent; nothing behind the guard has seen the whole of it.
        await sending[0].give(PIECE[50:], end=True)
        assert (sending[0].status, sending[0].refused) == (429, True)
        await quick[0].leave()
        await sending[1].give(PIECE[50:], end=True)
        assert sending[1].status == 200
        assert app.budget.questions == 2

    run(test, max_requests=20, max_questions=4)


def test_a_full_queue_behind_the_guard_refuses_at_the_door_and_holds_nothing() -> None:
    async def test(app: Guard) -> None:
        full.append(True)
        for path in (ASK, "/v1/rag/search"):
            refused = await Client(app, path=path, length=100).give()
            assert (refused.status, refused.refused) == (503, True)
            assert app.budget.used == (0, 0)
        assert (await Client(app, path="/generate").give(end=True)).status == 200
        full.clear()
        for path in (ASK, "/v1/rag/search"):
            assert (await Client(app, path=path).give(end=True)).status == 200
        assert asked == ["acme"] * 4

    def check(tenant: str) -> None:
        asked.append(tenant)
        if full:
            raise ApiError(503, "no room", retry_s=1)

    full: list[bool] = []
    asked: list[str] = []
    run(test, max_requests=20, rooms=dict.fromkeys((ASK, "/v1/rag/search"), check))


def test_a_websocket_counts_as_long_as_it_is_open() -> None:
    async def test(app: Guard) -> None:
        async def socket() -> list[dict[str, Any]]:
            client = Client(app, key=OPERATOR, path="/v1/realtime")
            client.task.cancel()
            said: list[dict[str, Any]] = []
            come: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
            come.put_nowait({"type": "websocket.connect"})

            async def send(message: Any) -> None:
                said.append(message)

            scope = {**client.scope, "type": "websocket", "extensions": {}}
            opened.append(asyncio.ensure_future(app(scope, come.get, send)))
            await asyncio.sleep(0.01)
            return said

        opened: list[asyncio.Future[None]] = []
        for _ in range(2):
            await socket()
        assert app.budget.used == (2, 0)
        assert [message["type"] for message in await socket()] == ["websocket.close"]
        opened[0].cancel()
        await asyncio.wait({opened[0]})
        assert app.budget.used == (1, 0)

    run(test)


def test_the_bounds_follow_the_largest_body_and_leave_connections_for_health() -> None:
    settings = ServerSettings(model=None, embedder="")  # type: ignore[arg-type]
    assert (settings.max_requests, settings.max_held_bytes) == (896, 512 << 20)
    large = ServerSettings(model=None, embedder="", max_upload_bytes=1 << 30, max_connections=1)  # type: ignore[arg-type]
    assert (large.max_requests, large.max_held_bytes) == (1, 8 << 30)
