"""Too much at once, too slow, or time to go: bounds of the server, without an engine."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from rag_pipeline.errors import EngineError, ModelError
from rag_pipeline.server.attribution import attribute
from rag_pipeline.server.embedders import EmbedderPool
from rag_pipeline.server.errors import refusal_of
from rag_pipeline.server.health import Health
from rag_pipeline.server.indexes import IndexTable
from rag_pipeline.server.settings import ServerSettings
from rag_pipeline.server.tenants import Tenants
from rag_pipeline.sglang_plugin.http.protocol import HttpLimits, limited_protocol
from rag_pipeline.sglang_plugin.http.stop import GracefulStop, Interrupts, handle_sigint
from retrievers import CorruptIndexError, IndexBusyError, RetrievalError, StorageError

# -- whose fault it is --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (CorruptIndexError("/srv/x/index.faiss is no index"), 503),
        (IndexBusyError("another process is changing the index /srv/x"), 503),
        (StorageError("/srv/x: No space left on device", errno.ENOSPC), 507),
        (StorageError("/srv/x: Disk quota exceeded", errno.EDQUOT), 507),
        (StorageError("/srv/x: Read-only file system", errno.EROFS), 500),
        (OSError(errno.EIO, "Input/output error", "/srv/x"), 500),
        (OSError(errno.ENOSPC, "No space left on device", "/srv/x"), 507),
        (ModelError("no embedder at /srv/x"), 503),
        (RetrievalError("where.$near is not known"), 400),
    ],
)  # fmt: skip
def test_a_fault_of_the_server_is_not_the_clients(error: Exception, status: int) -> None:
    refusal = refusal_of(error)
    assert refusal is not None
    assert refusal[0] == status
    assert "/srv" not in refusal[1]


# -- attribution --------------------------------------------------------------------------------


class Counted(str):
    """Text that counts the letters that are looked at, one by one or in a slice."""

    looks = 0

    def __iter__(self) -> Iterator[str]:
        for letter in super().__iter__():
            type(self).looks += 1
            yield letter

    def __getitem__(self, key: Any) -> str:
        part = super().__getitem__(key)
        type(self).looks += len(part)
        return part


@pytest.mark.parametrize(
    "unit", [".", ".a", ". ", "a. b ", "\n", "word. ", "?!.x", "a ", " ", ".\n"]
)
def test_attribution_of_twice_the_text_takes_twice_the_steps(unit: str) -> None:
    def steps(times: int) -> int:
        Counted.looks = 0
        attribute(Counted(unit * times), ["a b word"])
        return Counted.looks

    once, twice = steps(2000), steps(4000)
    assert once >= 2000 * len(unit)  # it is this text that is counted
    assert twice <= 2 * once + 10


def test_sentences_end_where_they_did() -> None:
    source = ["one two three four"]
    for answer, parts in [
        ("one two. three four!", [(0, 20)]),
        ("  one two  \n\n x y. one two?! ", [(2, 9), (19, 28)]),
        ("one two...three four", [(0, 20)]),
        ("", []),
        (" \n ", []),
    ]:
        assert [(a.start, a.end) for a in attribute(answer, source)] == parts


# -- health -------------------------------------------------------------------------------------


class Halted:
    """An engine that reported once, and whose scheduler cannot be asked any more."""

    incremental, context_length = False, 100
    last_state = {"version": "0", "internal_states": [{}]}  # noqa: RUF012

    def __init__(self, error: Exception) -> None:
        self._error = error

    async def state(self) -> dict[str, Any]:
        raise self._error


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (EngineError("the scheduler did not report within 20 s"), "did not report within 20 s"),
        (OSError("the pipe /srv/x is broken"), "could not be asked (OSError)"),
    ],
)
def test_a_scheduler_that_cannot_be_asked_is_told(
    tmp_path: Path, error: Exception, told: str
) -> None:
    tenants = Tenants({})
    health = Health(
        engine=cast("Any", Halted(error)),
        settings=ServerSettings(model=tmp_path, embedder="none"),
        tenants=tenants,
        indexes=IndexTable(tenants.all(), EmbedderPool("none")),
        model_name="m",
        prompt_date="fixed",
        model_gate=None,
    )

    async def run() -> None:
        for _ in range(2):
            report = await health.report(tenants.operator)
            assert report["status"] == "degraded"
            assert any(told in problem for problem in report["problems"]), report["problems"]

    asyncio.run(run())


# -- stopping -----------------------------------------------------------------------------------


class Door:
    stopping = False
    in_flight = 2


def stop(door: Door, limit_s: float, *, leave: Callable[[list[str]], None]) -> list[str]:
    """What happens after SIGTERM; `leave` runs at every step and may let requests end."""
    said: list[str] = []

    async def run() -> None:
        stopper = GracefulStop(door, limit_s=limit_s, last_resort=lambda: said.append("killed"))
        stopper.on_signal(lambda: said.append("abort"), lambda: said.append("finish"))
        assert door.stopping
        while "finish" not in said:
            leave(said)
            if "again" in said:
                stopper.on_signal(lambda: None, lambda: None)
            await asyncio.sleep(0.01)

    asyncio.run(run())
    return [word for word in said if word != "again"]


def test_a_stop_waits_for_requests_that_are_searching_still() -> None:
    door = Door()

    def leave(said: list[str]) -> None:
        said.append("left")
        if said.count("left") > 5:
            door.in_flight = 0

    said = stop(door, 60, leave=leave)
    assert "abort" not in said
    assert said.count("left") > 5


def test_a_stop_has_a_limit() -> None:
    door = Door()

    def leave(said: list[str]) -> None:
        if "abort" in said:
            door.in_flight = 0

    assert stop(door, 0.05, leave=leave) == ["abort", "finish"]


def test_background_work_is_ended_behind_the_last_request() -> None:
    door, said = Door(), []

    async def run() -> None:
        stopper = GracefulStop(
            door, limit_s=60, last_resort=lambda: None, end_background=lambda: said.append("end")
        )
        stopper.on_signal(lambda: None, lambda: said.append("finish"))
        await asyncio.sleep(0.25)
        assert not said
        door.in_flight = 0
        while "finish" not in said:
            await asyncio.sleep(0.01)

    asyncio.run(run())
    assert said == ["end", "finish"]


def test_a_second_signal_ends_the_waiting() -> None:
    door = Door()

    def leave(said: list[str]) -> None:
        said.append("again")
        if "abort" in said:
            door.in_flight = 0

    assert stop(door, 3600, leave=leave) == ["abort", "finish"]


def test_ctrl_c_begins_the_same_stop_and_only_a_second_one_ends_at_once() -> None:
    said: list[str] = []
    take = Interrupts(lambda: said.append("stop"), lambda: said.append("end"), same_s=3600)
    take(signal.SIGINT, None)
    take(signal.SIGINT, None)  # of `timeout`, which tells the group too
    assert said == ["stop"]
    take = Interrupts(lambda: said.append("stop"), lambda: said.append("end"), same_s=0)
    take(signal.SIGINT, None)
    take(signal.SIGINT, None)
    assert said == ["stop", "stop", "end"]


def test_sigint_of_a_serving_process_is_handed_to_sglang_s_handler_of_sigterm(
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = signal.getsignal(signal.SIGINT)

    class Handler:
        def sigterm_handler(self) -> None:
            stopped.set()

    async def run() -> None:
        handle_sigint(lambda: None)(None, Handler(), None)
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.wait_for(stopped.wait(), 60)

    stopped = asyncio.Event()
    try:
        asyncio.run(run())
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err.count("\n") == 1


# -- connections --------------------------------------------------------------------------------


async def echo(scope: Any, receive: Any, send: Any) -> None:
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        size, more = size + len(message["body"]), message["more_body"]
    body = str(size).encode()
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


@contextlib.contextmanager
def listening(
    app: Any = echo, *, timeout_keep_alive: float = 5, **limits: Any
) -> Iterator[Callable[[], socket.socket]]:
    """A real uvicorn server on a free port; gives connections to it."""
    import uvicorn

    protocol = limited_protocol(HttpLimits(**limits))
    config = uvicorn.Config(
        app,
        port=0,
        http=protocol,
        log_level="error",
        lifespan="off",
        timeout_keep_alive=timeout_keep_alive,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        threading.Event().wait(0.01)
    place = server.servers[0].sockets[0].getsockname()
    opened: list[socket.socket] = []

    def connect() -> socket.socket:
        opened.append(socket.create_connection(place, timeout=60))
        return opened[-1]

    try:
        yield connect
    finally:
        for connection in opened:
            connection.close()
        server.should_exit = True
        thread.join(60)


def received(connection: socket.socket) -> bytes:
    piece = connection.recv(4096)
    assert piece, "the server has closed"
    return piece


def one_answer(connection: socket.socket) -> bytes:
    """Header and body of one answer, in however many pieces it comes."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += received(connection)
    head, _, body = data.partition(b"\r\n\r\n")
    size = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
    while len(body) < size:
        body += received(connection)
    return head + b"\r\n\r\n" + body


def answer(connection: socket.socket) -> bytes:
    """All that comes until the server closes."""
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(4096):
            data += piece
    return data


REQUEST = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 4\r\n"


def test_a_client_that_does_not_get_on_is_let_go() -> None:
    with listening(header_s=0.3, body_s=0.3) as connect:
        for sent, status in [
            (b"", b"HTTP/1.1 408"),
            (b"GET", b"HTTP/1.1 408"),
            (REQUEST, b"HTTP/1.1 408"),
            (REQUEST + b"\r\n12", b""),
        ]:
            connection = connect()
            connection.sendall(sent)
            assert answer(connection)[:12] == status
        second = connect()  # the same in a second request on one connection
        second.sendall(REQUEST + b"\r\n1234")
        assert one_answer(second).startswith(b"HTTP/1.1 200")
        second.sendall(b"GET / HTT")
        assert b"HTTP/1.1 408" in answer(second)


def test_a_client_that_gets_on_slowly_is_served() -> None:
    """Every piece comes in time, the whole takes longer; idle between two requests is no fault."""
    with listening(header_s=1.0, body_s=1.0, body_step=1) as connect:
        connection = connect()
        pause = threading.Event()
        for _ in range(2):
            connection.sendall(REQUEST + b"\r\n")
            for _ in range(4):
                pause.wait(0.4)
                connection.sendall(b"1")
            assert one_answer(connection).endswith(b"\r\n\r\n4")
            pause.wait(1.5)


async def refuse(scope: Any, receive: Any, send: Any) -> None:
    """An answer that does not wait for the body."""
    await send(
        {"type": "http.response.start", "status": 503, "headers": [(b"content-length", b"0")]}
    )
    await send({"type": "http.response.body"})


def test_a_connection_that_is_kept_behind_a_refusal_is_let_go_too() -> None:
    with listening(refuse, header_s=60, body_s=60, timeout_keep_alive=0.5) as connect:
        for pieces in (
            [REQUEST + b"\r\n1234"],
            [REQUEST + b"\r\n", b"1234"],
            [REQUEST + b"\r\n12", b"34"],
        ):
            connection = connect()
            for _ in range(2):  # it can be used again
                connection.sendall(pieces[0])
                assert b"HTTP/1.1 503" in one_answer(connection)
                for piece in pieces[1:]:
                    connection.sendall(piece)
            assert answer(connection) == b""


def test_connections_are_bounded_and_the_next_one_is_told() -> None:
    with listening(max_connections=2) as connect:
        first, second = connect(), connect()
        for connection in (first, second):
            connection.sendall(REQUEST + b"\r\n1234")
            assert one_answer(connection).startswith(b"HTTP/1.1 200")
        refused = answer(connect())
        assert refused.startswith(b"HTTP/1.1 503")
        assert b"retry-after: 1" in refused
        first.close()
        for _ in range(1000):
            third = connect()
            third.sendall(REQUEST + b"\r\n1234")
            if one_answer(third).startswith(b"HTTP/1.1 200"):
                return
        pytest.fail("a place that is free is not given again")
