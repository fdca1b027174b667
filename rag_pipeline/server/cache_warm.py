"""Chunks of an index into the chunk cache ahead of the questions, through the engine that serves."""

from __future__ import annotations

import time
from itertools import islice
from typing import TYPE_CHECKING, Any

from rag_pipeline.prompts.warm_up import warm_requests
from rag_pipeline.server.errors import ApiError

if TYPE_CHECKING:
    from starlette.requests import Request

    from rag_pipeline.server.service import RagService
    from rag_pipeline.server.tenants import Tenant
    from retrievers.types import Chunk

WARM_S = 240.0
"""Longest that one request computes, seconds; the answer tells where the next one goes on."""


async def warm_index(
    service: RagService,
    tenant: Tenant,
    http_request: Request,
    *,
    index: str | None,
    offset: int,
    limit: int,
) -> dict[str, Any]:
    """Compute chunks one after the other, beside the questions that come meanwhile.

    Parameters
    ----------
    service : RagService
        Of this server.
    tenant : Tenant
        Whose index it is, and whose the chunk KV will be.
    http_request : Request
        The request that asks; nothing more is computed when its client goes away.
    index : str or None
        Name of the index; None for the default.
    offset, limit : int
        Which of its chunks.

    Raises
    ------
    ApiError
        404 for an index that holds nothing.
    """
    served = service.indexes.get(tenant, index)

    def read() -> tuple[int, list[Chunk]]:
        current = served.current()
        if current is None:
            raise ApiError(404, f"index {served.name!r} is empty; upload documents first")
        return len(current), list(islice(current.chunks(), offset, offset + limit))

    total, chunks = await service.in_thread(tenant, read)
    until, done = time.monotonic() + WARM_S, 0
    for chunk in chunks:
        if time.monotonic() > until or await http_request.is_disconnected():
            break
        for request in await service.in_thread(tenant, warm_requests, service.builder, chunk):
            params = request.sampling.to_params()
            async for _ in service.engine.generate(
                request, params=params, http_request=http_request, stream=False
            ):
                pass
        done += 1
    following = offset + done
    return {
        "index": served.name,
        "warmed": done,
        "total": total,
        "next_offset": following if following < total else None,
    }
