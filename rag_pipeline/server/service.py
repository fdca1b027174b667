"""What all routes share: engine, prompt builder, indexes, tenants, uploads, and the threads for blocking work."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from rag_pipeline.server.errors import ApiError
from rag_pipeline.server.work_pool import WorkPool

if TYPE_CHECKING:
    from starlette.requests import Request

    from rag_pipeline.prompts.builder import PromptBuilder
    from rag_pipeline.server.embedders import EmbedderPool
    from rag_pipeline.server.health import Health
    from rag_pipeline.server.indexes import IndexTable
    from rag_pipeline.server.ingest_jobs import IngestJobs
    from rag_pipeline.server.memories import Memories
    from rag_pipeline.server.settings import ServerSettings
    from rag_pipeline.server.tenants import Tenant
    from rag_pipeline.sglang_plugin.http.served_engine import ServedEngine

T = TypeVar("T")

RETRIEVAL_THREADS = 8
"""Searches mostly wait for the one embedder; so many of them may share a pass of it."""


@dataclass(kw_only=True)
class RagService:
    """State of the RAG routes of one server process."""

    settings: ServerSettings
    engine: ServedEngine
    builder: PromptBuilder
    num_tenants: int
    indexes: IndexTable
    jobs: IngestJobs
    health: Health
    model_name: str
    embedders: EmbedderPool
    started: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        limit = self.settings.max_searches
        share = max(1, limit // 2) if self.num_tenants else limit
        self._work = WorkPool(RETRIEVAL_THREADS, limit=limit, share=share)
        # An answer that is there is not refused for want of room: as many wait as the engine answers.
        self._after = ThreadPoolExecutor(1, thread_name_prefix="rag-after")

    @cached_property
    def memories(self) -> Memories:
        """Memories of long conversations."""
        from rag_pipeline.server.memories import Memories

        return Memories(
            self.engine,
            self.builder.tokenizer,
            self.embedders,
            self.settings.memory,
            self._work.run_held,
        )

    def tenant(self, request: Request) -> Tenant:
        """Tenant of a request, as the guard found it; nobody's requests get no answer here."""
        tenant: Tenant | None = request.scope.get("state", {}).get("rag_tenant")
        if tenant is None:
            raise ApiError(401, "send `Authorization: Bearer KEY` with a key of this server")
        return tenant

    def model_entry(self) -> dict[str, Any]:
        """The served model as OpenAI's clients read it."""
        return {
            "id": self.model_name,
            "object": "model",
            "created": self.started,
            "owned_by": "rag-pipeline",
        }

    async def in_thread(self, tenant: Tenant, function: Callable[..., T], *args: Any) -> T:
        """Run blocking work beside the event loop, which streams everybody's answers.

        Raises
        ------
        ApiError
            429 or 503 where too much waits already.
        """
        return await self._work.run(tenant.name, function, *args)

    async def for_question(self, tenant: Tenant, function: Callable[..., T], *args: Any) -> T:
        """Run the blocking work of a question, which holds one of the server's places for questions."""
        return await self._work.run_held(tenant.name, function, *args)

    def check_room(self, tenant: str) -> None:
        """Say at the door what :meth:`in_thread` would say behind it.

        Raises
        ------
        ApiError
            429 or 503 where too much waits already.
        """
        self._work.check_room(tenant)

    async def after(self, function: Callable[[], T]) -> T:
        """Run the work behind an answer, beside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._after, function)
