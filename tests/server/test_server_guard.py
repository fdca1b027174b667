"""The guard around the whole application, in this process: hosts, origins, keys."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from guarded import (
    ADMIN,
    OPERATOR,
    OWN,
    TENANT,
    ask,
    bearer,
    guard,
    one_line,
    sglang_app,
)

from rag_pipeline.errors import RagPipelineError
from rag_pipeline.server.access import Access, find_route
from rag_pipeline.server.addresses import is_loopback, is_own_origin, parse_host

# -- hosts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "loopback"),
    [
        ("127.0.0.1", True), ("127.0.0.1:30000", True), ("127.8.9.1", True), ("localhost", True),
        ("LOCALHOST:1", True), ("localhost.", True), ("127.0.0.1.", True), ("[::1]", True), ("[::1]:80", True),
        ("[::ffff:127.0.0.1]:80", True), ("[0:0:0:0:0:0:0:1]", True),
        ("127.evil.example", False), ("127.0.0.1.evil.example", False), ("127.1", False), ("0.0.0.0", False),
        ("localhost.evil.example", False), ("evil.localhost", False), ("10.0.0.1", False), ("[::]", False),
        ("[::ffff:10.0.0.1]", False), ("[::2]:80", False), ("example.org.:80", False),
    ],
)  # fmt: skip
def test_only_what_can_name_nothing_else_is_this_machine(header: str, loopback: bool) -> None:
    host = parse_host(header)
    assert host is not None
    assert host.is_loopback is loopback


@pytest.mark.parametrize(
    "header",
    ["", " ", ":80", "a b", "a:", "a:b", "a:99999", "a:1:2", "::1", "[::1", "[::1]80", "[::1]:", "[127.0.0.1]",
     "[fe80::1%eth0]", "user@localhost", "localhost/x", "x/health?", "a..b", ".", "-", "é", "127.0.0.1\t",
     "localhost:٣"],
)  # fmt: skip
def test_what_is_no_host_is_refused(header: str) -> None:
    assert parse_host(header) is None


def test_addresses_to_listen_on() -> None:
    for host in ("127.0.0.1", "127.0.0.2", "localhost", "::1", "LocalHost"):
        assert is_loopback(host)
    for host in ("0.0.0.0", "::", "", "127.evil.example", "192.168.1.2", "box", "::ffff:10.0.0.1"):
        assert not is_loopback(host)


def test_an_origin_is_own_by_name_and_port() -> None:
    def own(origin: str, host: str) -> bool:
        parsed = parse_host(host)
        assert parsed is not None
        return is_own_origin(origin, parsed)

    assert own("http://127.0.0.1:30000", "127.0.0.1:30000")
    assert own("http://LOCALHOST", "localhost")
    assert own("https://localhost:443", "localhost.")
    assert own("http://[::1]:80", "[0::1]")
    for origin, host in [
        ("http://127.0.0.1:30001", "127.0.0.1:30000"), ("http://localhost:30000", "127.0.0.1:30000"),
        ("null", "127.0.0.1"), ("", "127.0.0.1"), ("127.0.0.1", "127.0.0.1"), ("file://", "127.0.0.1"),
        ("chrome-extension://127.0.0.1", "127.0.0.1"), ("http://127.0.0.1/x", "127.0.0.1"),
        ("http://x@127.0.0.1", "127.0.0.1"),
    ]:  # fmt: skip
        assert not own(origin, host)


# -- protected mode -----------------------------------------------------------------------------

# What a request of a foreign page looks like, by any of the ways that a browser has.
STRANGERS: dict[str, tuple[int, dict[str, Any] | list[tuple[str, str]]]] = {
    "origin": (403, {"Origin": "https://evil.example"}),
    "no origin of its own": (403, {"Origin": "null"}),
    "another port here": (403, {"Origin": "http://127.0.0.1:30001"}),
    "an image": (403, {"Sec-Fetch-Site": "cross-site"}),
    "a neighbour": (403, {"Sec-Fetch-Site": "same-site"}),
    "rebound": (403, {"Host": "evil.example:30000", "Origin": "http://evil.example:30000"}),
    "rebound, without origin": (403, {"Host": "127.evil.example"}),
    "the unspecified address": (403, {"Host": "0.0.0.0:30000"}),
    "two origins": (
        403,
        [("Host", "127.0.0.1"), ("Origin", "http://127.0.0.1"), ("Origin", "null")],
    ),
    "two hosts": (400, [("Host", "127.0.0.1"), ("Host", "evil.example")]),
    "no host": (400, {"Host": ""}),
    "a host that is none": (400, {"Host": "x/health?"}),
}


@pytest.mark.parametrize("kind", STRANGERS)
@pytest.mark.parametrize(
    "path", ["/generate", "/server_info", "/metrics", "/v1/rag/search", "/health", "/no"]
)
def test_no_foreign_page_reaches_a_server_without_a_key(kind: str, path: str) -> None:
    status, headers = STRANGERS[kind]
    for method in ("GET", "POST", "OPTIONS"):
        answer = ask(guard(key=None), path, method=method, headers=headers)
        assert answer.status_code == status, (kind, path, method, answer.text)
        assert one_line(answer)


def test_its_own_page_and_this_machine_reach_it() -> None:
    for headers in (
        {},
        {"Origin": OWN, "Sec-Fetch-Site": "same-origin"},
        {"Sec-Fetch-Site": "none"},
        {"Host": "localhost:9"},
        {"Host": "[::1]:30000", "Origin": "http://[::1]:30000"},
        bearer("EMPTY"),  # what OpenAI's client sends where no key is needed
        {"Authorization": b"Bearer \xe9"},
    ):
        assert ask(guard(key=None), headers=headers).json()["tenant"] == "operator"
    # A link on another site leads to the page, and to nothing else.
    assert ask(guard(key=None), "/rag", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 200


def test_a_proxys_word_that_a_client_is_elsewhere_is_heard() -> None:
    assert ask(guard(key=None), client=("10.1.2.3", 9)).status_code == 403
    assert ask(guard(), client=("10.1.2.3", 9), headers=bearer(OPERATOR)).status_code == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.168.1.2", "box", "127.evil.example"])
def test_without_a_key_no_other_machine_is_served_unless_told_so(host: str) -> None:
    with pytest.raises(RagPipelineError, match="--unprotected-without-key"):
        guard(key=None, host=host)
    guard(host=host)
    opened = guard(key=None, host=host, open_to_network=True)
    assert (
        ask(opened, headers={"Host": "192.168.1.2:30000"}, client=("10.1.2.3", 9)).status_code
        == 200
    )
    # A page with a name of its own is still kept out.
    for headers in (
        {"Host": "evil.example"},
        {"Host": "192.168.1.2", "Origin": "https://evil.example"},
    ):
        assert ask(opened, headers=headers).status_code == 403


@pytest.mark.engine
def test_sglangs_own_app_is_guarded_with_its_cors() -> None:
    """The review's attack on the real app: a foreign page reads and changes nothing."""
    real = sglang_app()
    evil = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    assert ask(real, "/docs", headers=evil).headers["access-control-allow-origin"]
    for method, path in (
        ("GET", "/docs"),
        ("OPTIONS", "/configure_logging"),
        ("GET", "/ping"),
    ):
        answer = ask(guard(real, key=None), path, method=method, headers=evil)
        assert answer.status_code == 403
        assert not [name for name in answer.headers if name.startswith("access-control")]
    assert ask(guard(real, key=None), "/docs").status_code == 200
    preflight = ask(guard(real), "/v1/models", method="OPTIONS", headers=evil)
    assert preflight.status_code == 200  # a page that brings a key may ask
    assert ask(guard(real), "/docs", method="OPTIONS").status_code == 401


# -- keys ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "header",
    [b"Bearer \xc3\xa9", b"Bearer \xff", b"\xe9", b"Bearer", b"Bearer ", b"Basic b3A6eA==", b"", b"Token x",
     b"Bearer " + b"x" * 9000, OPERATOR.encode(), b"Bearer tenant-key-012345678", b"bearer\t" + OPERATOR.encode()],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/v1/rag/search", "/generate", "/flush_cache", "/metrics", "/no"])
def test_a_header_that_is_no_key_is_401(header: bytes, path: str) -> None:
    for rules in ({}, {"admin_key": ADMIN}):
        answer = ask(guard(**rules), path, headers=[(b"Authorization", header)])
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
        assert one_line(answer)


def test_two_keys_are_none() -> None:
    both = [("Authorization", f"Bearer {OPERATOR}"), ("Authorization", f"Bearer {TENANT}")]
    assert ask(guard(), headers=both).status_code == 401


def test_who_opens_what() -> None:
    def status(path: str, sent: str, **rules: Any) -> int:
        return ask(guard(**rules), path, headers=bearer(sent)).status_code

    assert [status("/v1/rag/search", key) for key in (OPERATOR, TENANT, ADMIN)] == [200, 200, 401]
    assert [status("/metrics", key) for key in (OPERATOR, TENANT, ADMIN)] == [200, 403, 401]
    assert [status("/flush_cache", key) for key in (OPERATOR, TENANT)] == [200, 403]
    admin = {"admin_key": ADMIN}
    assert [status("/flush_cache", key, **admin) for key in (OPERATOR, TENANT, ADMIN)] == [
        401,
        401,
        200,
    ]
    assert [status("/v1/models", key, **admin) for key in (OPERATOR, ADMIN)] == [200, 401]
    # With an administrator's key alone the rest is as without any.
    assert status("/v1/models", "EMPTY", key=None, **admin) == 200
    assert status("/flush_cache", "EMPTY", key=None, **admin) == 401
    # The chunk cache: its figures are for any key, listing and changing it for the administrator's alone.
    orders = ["entries", "pin", "unpin", "prefetch", "evict", "verify", "warm"]
    for path in (f"/v1/rag/cache/{order}" for order in orders):
        assert [status(path, key) for key in (OPERATOR, TENANT, ADMIN)] == [200, 403, 401], path
        assert [status(path, key, **admin) for key in (OPERATOR, TENANT, ADMIN)] == [401, 401, 200]
    assert [status("/v1/rag/cache", key, **admin) for key in (OPERATOR, TENANT, ADMIN)] == [
        200,
        200,
        401,
    ]
    assert ask(guard(), headers=bearer(TENANT)).json()["tenant"] == "acme"
    assert ask(guard(), "/health").json()["tenant"] is None


@pytest.mark.parametrize(
    "path",
    ["/v1/ragged", "/v1/rag", "/v1/rag/", "/v1/chat/completions/..", "/generate/", "/GENERATE", "//generate",
     "/v1/rag/jobs/a/b", "/metrics/", "/metricsx", "/health/", "/healthy", "/readyx", "/rag/..", "/rag/x"],
)  # fmt: skip
def test_a_path_that_only_looks_like_an_open_one_is_closed(path: str) -> None:
    assert find_route({"path": path})[1] is Access.OPERATOR


def test_a_prefix_of_a_proxy_is_not_part_of_the_path() -> None:
    assert find_route({"path": "/x/v1/rag/search", "root_path": "/x"}) == (
        "/v1/rag/search",
        Access.TENANT,
    )


def test_a_websocket_needs_the_key_too() -> None:
    """SGLang's own check looks at HTTP only."""

    async def open_one(headers: list[tuple[bytes, bytes]], **options: Any) -> list[dict[str, Any]]:
        said: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            return {"type": "websocket.connect"}

        async def send(message: Any) -> None:
            said.append(message)

        scope = {"type": "websocket", "path": "/v1/realtime", "headers": headers, **options}
        await guard(key=OPERATOR if b"authorization" in dict(headers) or options else None)(
            scope, receive, send
        )
        return said

    key = (b"authorization", f"Bearer {OPERATOR}".encode())
    host = (b"host", b"127.0.0.1:30000")
    accepted = asyncio.run(open_one([host, key]))
    assert [message["type"] for message in accepted] == ["websocket.accept"]
    refused = asyncio.run(open_one([host], extensions={"websocket.http.response": {}}))
    assert refused[0]["status"] == 401
    assert json.loads(refused[1]["body"])["error"]["code"] == 401
    closed = asyncio.run(open_one([host], extensions={}))
    assert [message["type"] for message in closed] == ["websocket.close"]
    page = asyncio.run(open_one([host, (b"origin", b"https://evil.example")]))
    assert [message["type"] for message in page] == ["websocket.close"]
