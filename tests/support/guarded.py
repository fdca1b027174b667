"""The guard around a small application in this process, and who asks it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx

from rag_pipeline.server.guard import Guard, GuardRules
from rag_pipeline.server.keys import digest_of
from rag_pipeline.server.tenants import Tenant, Tenants

OPERATOR, TENANT, ADMIN = "operator-key-0123456789", "tenant-key-0123456789", "admin-key-0123456789"
OWN = "http://127.0.0.1:30000"
ACME = Tenant(name="acme", salt="tenant-1", indexes={})


def tenants(*, key: str | None = OPERATOR) -> Tenants:
    return Tenants({}, {digest_of(TENANT): ACME} if key else {}, operator_key=key)


async def reached(scope: Any, receive: Any, send: Any) -> None:
    """What stands behind the guard: reads the body, says who it was and where it was sent."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.accept"})
        return
    size, more = 0, True
    while more:
        message = await receive()
        size, more = size + len(message.get("body", b"")), message.get("more_body", False)
    tenant = scope["state"]["rag_tenant"]
    said = json.dumps({"size": size, "tenant": tenant and tenant.name}).encode()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": said})


def guard(app: Any = reached, *, key: str | None = OPERATOR, **more: Any) -> Guard:
    return Guard(app, GuardRules(**{"host": "127.0.0.1", "tenants": tenants(key=key), **more}))


def ask(
    app: Any,
    path: str = "/v1/models",
    *,
    method: str = "GET",
    headers: dict[str, Any] | list[tuple[Any, Any]] | None = None,
    content: Any = None,
    client: tuple[str, int] = ("127.0.0.1", 5),
) -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app, client=client, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url=OWN) as sender:
            return await sender.request(method, path, headers=headers, content=content)

    return asyncio.run(send())


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def one_line(answer: httpx.Response) -> bool:
    error = answer.json()["error"]
    return "\n" not in error["message"] and error["code"] == answer.status_code


def sglang_app() -> Any:
    import sglang.srt.plugins

    sglang.srt.plugins.load_plugins()
    from sglang.srt.entrypoints import http_server

    return http_server.app
