"""Every route, with every kind of key, from every kind of page: what is answered, and what must be.

The driver needs an ``httpx`` client and no server of its own: a test gives it the guard in this process, the
benchmark of reliability a running server. What must be answered is written down here from docs/security.md and
not asked of the guard.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

from rag_pipeline.server.access import ROUTES, Access

METHODS = ("GET", "POST")
KEYS = ("none", "empty", "tenant", "operator", "non_ascii")
ORIGINS = ("own", "foreign", "rebound", "127.x.evil")

_NOT_ASCII = b"Bearer caf\xe9-0123456789abcdef"


@dataclass(frozen=True, kw_only=True, slots=True)
class MatrixTarget:
    """What is asked.

    Parameters
    ----------
    url : str
        As its own clients write it: ``http://127.0.0.1:30000``.
    operator_key : str or None
        None for a server that needs no key.
    tenant_key : str or None
        None for a server without tenants; the column is left out.
    """

    url: str
    operator_key: str | None = None
    tenant_key: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One request of the matrix."""

    method: str
    route: str
    access: Access
    key: str
    origin: str

    def wanted(self, target: MatrixTarget) -> frozenset[int]:
        """Statuses that refuse it as they should; empty where it is to be let through."""
        if target.operator_key is None:
            return frozenset() if self.origin == "own" else frozenset({400, 403})
        if self.access is Access.OPEN or self.key == "operator":
            return frozenset()
        if self.key == "tenant":
            return frozenset() if self.access is Access.TENANT else frozenset({403})
        return frozenset({401})

    def headers(self, target: MatrixTarget) -> list[tuple[bytes, bytes]]:
        """Headers that make the request what it is."""
        own = target.url.partition("://")[2]
        port = own.rpartition(":")[2]
        host = {"rebound": f"evil.example:{port}", "127.x.evil": f"127.evil.example:{port}"}
        page = {"own": target.url, "foreign": "https://evil.example"}
        called = host.get(self.origin, own)
        headers = [
            (b"host", called.encode()),
            (b"origin", page.get(self.origin, f"http://{called}").encode()),
            (b"content-type", b"application/json"),
        ]
        key = {"operator": target.operator_key, "tenant": target.tenant_key}.get(self.key)
        written = {"empty": b"Bearer", "non_ascii": _NOT_ASCII}.get(self.key)
        if key is not None:
            written = f"Bearer {key}".encode()
        return headers if written is None else [*headers, (b"authorization", written)]


@dataclass(slots=True)
class MatrixReport:
    """How it went; JSON-ready by :meth:`to_json`."""

    tried: int = 0
    skipped: int = 0
    unlisted_answers: list[str] = field(default_factory=list)
    server_errors: list[str] = field(default_factory=list)
    wrongly_refused: list[str] = field(default_factory=list)

    @property
    def failed(self) -> int:
        """Requests that were not answered as they must be."""
        return len(self.unlisted_answers) + len(self.server_errors) + len(self.wrongly_refused)

    def to_json(self) -> dict[str, Any]:
        """What was tried, what failed, and the first of each kind."""
        kinds = ("unlisted_answers", "server_errors", "wrongly_refused")
        return {
            "tried": self.tried,
            "skipped": self.skipped,
            "failed": self.failed,
            **{kind: {"count": len(getattr(self, kind)), "first": getattr(self, kind)[:5]} for kind in kinds},
        }  # fmt: skip


def cells(target: MatrixTarget, routes: Mapping[str, Access] = ROUTES) -> Iterator[Cell]:
    """Every request of the matrix."""
    keys = [key for key in KEYS if key != "tenant" or target.tenant_key is not None]
    if target.operator_key is None:
        keys.remove("operator")
    for route, access in routes.items():
        for method in METHODS:
            for key in keys:
                for origin in ORIGINS:
                    yield Cell(method=method, route=route, access=access, key=key, origin=origin)


def harmless(cell: Cell) -> bool:
    """Whether a request may reach a running server's route: it changes nothing and starts no work."""
    ours = cell.route.startswith("/v1/rag") or cell.access is Access.OPEN
    return ours or (cell.method == "GET" and cell.access is Access.TENANT)


async def run_matrix(
    client: httpx.AsyncClient,
    target: MatrixTarget,
    *,
    routes: Mapping[str, Access] = ROUTES,
    reach: Callable[[Cell], bool] = harmless,
    at_once: int = 1,
) -> MatrixReport:
    """Send the matrix.

    Parameters
    ----------
    client : AsyncClient
        Its base URL is not used.
    target : MatrixTarget
        Where to, and with which keys.
    routes : mapping of str to Access
        Path templates and what opens them.
    reach : callable
        Whether a request that is to be let through may be sent at all.
    at_once : int
        Requests in flight. A route that asks the engine waits a second for it.
    """
    report = MatrixReport()
    asked = [(cell, cell.wanted(target)) for cell in cells(target, routes)]
    sent = [(cell, wanted) for cell, wanted in asked if wanted or reach(cell)]
    report.skipped = len(asked) - len(sent)
    limit = asyncio.Semaphore(at_once)

    async def status_of(cell: Cell) -> int:
        url = target.url + _filled(cell.route)
        body = b"{}" if cell.method == "POST" else None
        request = client.build_request(cell.method, url, content=body)
        request.headers = httpx.Headers([*cell.headers(target), *_length(body)])
        async with limit:
            return (await client.send(request)).status_code

    statuses = await asyncio.gather(*(status_of(cell) for cell, _ in sent))
    report.tried = len(statuses)
    for (cell, wanted), status in zip(sent, statuses, strict=True):
        line = f"{cell.method} {cell.route} key={cell.key} origin={cell.origin}: {status}"
        if status >= 500:
            report.server_errors.append(line)
        elif wanted and status not in wanted:
            report.unlisted_answers.append(line)
        elif not wanted and status in (401, 403):
            report.wrongly_refused.append(line)
    return report


def _filled(route: str) -> str:
    head, brace, tail = route.partition("{")
    return head if not brace else f"{head}x{tail.partition('}')[2]}"


def _length(body: bytes | None) -> list[tuple[bytes, bytes]]:
    return [] if body is None else [(b"content-length", str(len(body)).encode())]
