"""Browsers as unwitting helpers: a server without a key answers pages of its own origin only.

SGLang's app allows every origin. A server on the loopback address is then open to any web page that its
user visits, directly or by a name that resolves to the loopback address. A key closes that: browsers send
none by themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from urllib.parse import urlsplit

from starlette.requests import Request

from rag_pipeline.server.errors import ApiError

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


def is_loopback(host: str) -> bool:
    """Whether an address to listen on can be reached from this machine only."""
    return host in LOOPBACK or host.startswith("127.")


def make_guard(*, host: str, has_key: bool) -> Callable[[Request], None]:
    """Make the check that every RAG route runs first.

    Parameters
    ----------
    host
        Address that the server listens on.
    has_key
        Whether every request must carry a key.
    """

    def guard(request: Request) -> None:
        if has_key:
            return
        called = request.headers.get("host", "")
        origin = request.headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != called:
            raise ApiError(
                403,
                f"origin {origin[:120]!r} is not this server; start it with --api-key to allow it",
            )
        name = _host_name(called)
        if is_loopback(host) and name not in LOOPBACK and not name.startswith("127."):
            raise ApiError(
                403,
                f"host {called[:120]!r} is not this machine's own name; start the server with --api-key "
                "to serve under another name",
            )

    return guard


def _host_name(header: str) -> str:
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.partition(":")[0].lower()
