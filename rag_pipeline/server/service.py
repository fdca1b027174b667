"""What all routes share: engine, prompt builder, indexes, tenants, uploads."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from rag_pipeline.errors import EngineError
from rag_pipeline.sglang_plugin.http_access import bearer_token
from rag_pipeline.sglang_plugin.served_engine import activation_in

if TYPE_CHECKING:
    from starlette.requests import Request

    from rag_pipeline.prompt_layout import PromptBuilder
    from rag_pipeline.server.indexes import IndexTable
    from rag_pipeline.server.ingest_jobs import IngestJobs
    from rag_pipeline.server.settings import ServerSettings
    from rag_pipeline.server.tenants import Tenant, Tenants
    from rag_pipeline.sglang_plugin.served_engine import ServedEngine

T = TypeVar("T")

RETRIEVAL_THREADS = 2
"""Search and layout are short and mostly wait for one embedder; more threads would only take turns."""


@dataclass(kw_only=True)
class RagService:
    """State of the RAG routes of one server process."""

    settings: ServerSettings
    engine: ServedEngine
    builder: PromptBuilder
    tenants: Tenants
    indexes: IndexTable
    jobs: IngestJobs
    model_name: str
    model_gate: Callable[[str], dict[str, Any]] | None = None
    """Verdict of the model gate for an attention class, where the caller can look it up."""

    started: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self._threads = ThreadPoolExecutor(RETRIEVAL_THREADS, thread_name_prefix="rag-retrieve")

    def tenant(self, request: Request) -> Tenant:
        """Tenant of a request that SGLang's key check has let through."""
        return self.tenants.of(bearer_token(request.headers.get("authorization")))

    def model_entry(self) -> dict[str, Any]:
        """The served model as OpenAI's clients read it."""
        return {
            "id": self.model_name,
            "object": "model",
            "created": self.started,
            "owned_by": "rag-pipeline",
        }

    async def in_thread(self, function: Callable[..., T], *args: Any) -> T:
        """Run blocking work beside the event loop, which streams everybody's answers."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *args)

    async def health(self, tenant: Tenant) -> dict[str, Any]:
        """Activation, gate, indexes and cache; ``degraded`` when one of them does not do its work."""
        problems: list[str] = []
        activation: dict[str, Any] = {"active": False}
        fusion: dict[str, Any] = {}
        try:
            info = await self.engine.state()
            activation = activation_in(info).to_json()
            fusion = info["internal_states"][0].get("rag_fusion") or {}
        except EngineError as error:
            problems.append(str(error))
        if not activation["active"]:
            problems.append("the plugin is not active in the scheduler")
        if not fusion.get("on"):
            problems.append(f"fusion is off: {fusion.get('off_reason') or 'no report'}")
        indexes = {
            name: await self.in_thread(index.status)
            for name, index in self.indexes.of(tenant).items()
        }
        problems += [
            f"index {name}: {found['error']}" for name, found in indexes.items() if not found["ok"]
        ]
        verdict: dict[str, Any] | None = None
        if self.model_gate is not None and activation["active"]:
            verdict = await self.in_thread(self.model_gate, activation["attention_class"])
        return {
            "status": "degraded" if problems else "ok",
            "problems": problems,
            "model": self.model_name,
            "tenant": tenant.name,
            "activation": activation,
            "gate": {
                "on": bool(fusion.get("on")),
                "reason": fusion.get("off_reason", ""),
                "self_check": fusion.get("self_check", "not run"),
                "policy": self.settings.policy,
                "model": verdict,
            },
            "index": indexes,
            "prompt_date": self.builder.tokenizer.date_policy,
            "cache": {"store": fusion.get("store", {}), "counts": fusion.get("counts", {})},
            "limits": {
                name: value
                for name, value in asdict(self.settings).items()
                if name.startswith(("max_", "parse_"))
            },
        }
