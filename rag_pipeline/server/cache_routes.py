"""The ``/v1/rag/cache`` routes: figures for any key, everything else for the administrator's (see :mod:`.access`)."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Coroutine
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response

from chunk_cache import tenant_mark
from rag_pipeline.protocol.cache_order import MAX_LISTED, CacheOrder
from rag_pipeline.server.cache_schemas import (
    CacheAnswer,
    DoneAnswer,
    EntriesAnswer,
    EvictOrder,
    KeysOrder,
    KeyWord,
    PinOrder,
    TierName,
    VerifyOrder,
    WarmOrder,
)
from rag_pipeline.server.cache_warm import warm_index
from rag_pipeline.server.errors import RagRoute
from rag_pipeline.server.routes import ERRORS
from rag_pipeline.server.service import RagService
from rag_pipeline.server.tenants import Tenant

FRESH_S = 1.0
"""Figures this old are asked for anew: a page asks often, and each answer lists a disk."""


class Figures:
    """Figures of each tenant; one question is under way for however many ask.

    Parameters
    ----------
    ask : callable
        Has the engine count for a tenant's mark, None for everybody.
    """

    def __init__(self, ask: Callable[[str | None], Coroutine[Any, Any, dict[str, Any]]]) -> None:
        self._ask = ask
        self._asking: dict[str, tuple[float, asyncio.Task[dict[str, Any]]]] = {}

    async def of(self, tenant: Tenant) -> dict[str, Any]:
        """Figures that are not older than :data:`FRESH_S`.

        Raises
        ------
        CacheOrderError
            Where the engine does not tell.
        """
        loop = asyncio.get_running_loop()
        asked_at, task = self._asking.get(tenant.name, (0.0, None))
        if task is None or (task.done() and loop.time() - asked_at > FRESH_S):
            mark = tenant_mark(tenant.salt) if tenant.salt else None
            task = loop.create_task(self._ask(mark))
            self._asking[tenant.name] = loop.time(), task
        return await asyncio.shield(task)  # whoever goes away leaves it to the others


def make_cache_router(service: RagService) -> APIRouter:
    """Build the router for one server."""
    router = APIRouter(
        prefix="/v1/rag/cache", route_class=RagRoute, responses=ERRORS, tags=["cache"]
    )

    async def carry_out(action: str, **fields: Any) -> dict[str, Any]:
        order = CacheOrder(action=action, ticket=secrets.token_hex(8), **fields)
        return await service.engine.order(order)

    of_tenants = Figures(lambda mark: carry_out("stats", tenant=mark))

    async def done(action: str, body: KeysOrder | EvictOrder | VerifyOrder) -> Response:
        fields = body.model_dump()
        if "keys" in fields:
            fields["keys"] = tuple(fields["keys"])
        return JSONResponse(
            {"object": "rag.cache.done", "action": action, **await carry_out(action, **fields)}
        )

    @router.get("", response_model=CacheAnswer)
    async def figures(request: Request) -> Response:
        """Count chunks, bytes and hits per tier: all of them for the operator, its own for a tenant."""
        tenant = service.tenant(request)
        told = await of_tenants.of(tenant)
        memory = service.memories.facts(tenant.salt)
        return JSONResponse(
            {"object": "rag.cache", "tenant": tenant.name, **told, "memory": memory}
        )

    @router.get("/entries", response_model=EntriesAnswer)
    async def entries(
        key: Annotated[list[KeyWord] | None, Query(max_length=64)] = None,
        tier: TierName = "",
        offset: Annotated[int, Query(ge=0, le=1 << 40)] = 0,
        limit: Annotated[int, Query(ge=1, le=MAX_LISTED)] = 1000,
    ) -> Response:
        """List records of everybody, the most recently used of memory first."""
        page = {"tier": tier, "offset": offset, "limit": limit}
        told = await carry_out("ls", keys=tuple(key or ()), **page)
        return JSONResponse({"object": "list", **told})

    @router.post("/pin", response_model=DoneAnswer)
    async def pin(body: PinOrder) -> Response:
        """Keep chunks, in memory and on the disk, for good or for a time."""
        return await done("pin", body)

    @router.post("/unpin", response_model=DoneAnswer)
    async def unpin(body: KeysOrder) -> Response:
        """Make chunks evictable again."""
        return await done("unpin", body)

    @router.post("/prefetch", response_model=DoneAnswer)
    async def prefetch(body: KeysOrder) -> Response:
        """Bring chunks from the tiers below into memory."""
        return await done("prefetch", body)

    @router.post("/evict", response_model=DoneAnswer)
    async def evict(body: EvictOrder) -> Response:
        """Remove chunks; pinned ones and those in use stay, and are named."""
        return await done("evict", body)

    @router.post("/verify", response_model=DoneAnswer)
    async def verify(body: VerifyOrder) -> Response:
        """Read every record against its checksums, and remove damaged ones."""
        return await done("verify", body)

    @router.post("/warm", response_model=DoneAnswer)
    async def warm(body: WarmOrder, request: Request) -> Response:
        """Compute chunks of an index ahead of the questions."""
        told = await warm_index(service, service.tenant(request), request, **body.model_dump())
        return JSONResponse({"object": "rag.cache.done", "action": "warm", **told})

    return router
