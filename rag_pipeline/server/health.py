"""How the server is, answered at once: the scheduler is asked in the background, never waited for.

The scheduler reports between two batches, which on a busy machine takes seconds, and searches have their own
threads: neither holds an answer up. A tenant sees its own indexes and no figures of the whole server.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rag_pipeline.errors import EngineError
from rag_pipeline.protocol import FUSION_KEY
from rag_pipeline.sglang_plugin.http.served_engine import activation_in

if TYPE_CHECKING:
    from rag_pipeline.server.indexes import IndexTable
    from rag_pipeline.server.settings import ServerSettings
    from rag_pipeline.server.tenants import Tenant, Tenants
    from rag_pipeline.sglang_plugin.http.served_engine import ServedEngine

logger = logging.getLogger(__name__)

FRESH_S = 0.5
"""A report of the scheduler this old is asked for anew."""
WAIT_S = 0.3
"""Longest wait for it; the last one is told until it comes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Report:
    """What the scheduler said last, or why it did not; told until it says more."""

    info: dict[str, Any] | None
    problem: str
    at: float


class Health:
    """State of one server.

    Parameters
    ----------
    engine : ServedEngine
        Whose scheduler is asked.
    settings : ServerSettings
        Shown in part.
    tenants, indexes : Tenants, IndexTable
        Whose indexes are looked at.
    model_name : str
        Name of the served model.
    prompt_date : str
        How prompts get their date.
    model_gate : callable or None
        Verdict of the model gate for an attention class, where the caller can look it up.
    """

    def __init__(
        self,
        *,
        engine: ServedEngine,
        settings: ServerSettings,
        tenants: Tenants,
        indexes: IndexTable,
        model_name: str,
        prompt_date: str,
        model_gate: Callable[[str], dict[str, Any]] | None,
    ) -> None:
        self._engine = engine
        self._settings = settings
        self._tenants = tenants
        self._indexes = indexes
        self._model_name = model_name
        self._prompt_date = prompt_date
        self._model_gate = model_gate
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rag-health")
        self._last: _Report | None = None
        self._asking: asyncio.Task[None] | None = None

    async def report(self, tenant: Tenant) -> dict[str, Any]:
        """Activation, gate, indexes and cache; ``degraded`` when one of them does not do its work."""
        last = await self._scheduler()
        activation: dict[str, Any] = {"active": False}
        fusion: dict[str, Any] = {}
        problems = [last.problem] if last.problem else []
        if last.info is not None:
            activation = activation_in(last.info).to_json()
            fusion = last.info["internal_states"][0].get(FUSION_KEY) or {}
            if not activation["active"]:
                problems.append("the plugin is not active in the scheduler")
            if not fusion.get("on"):
                problems.append(f"fusion is off: {fusion.get('off_reason') or 'no report'}")
        attention = activation["attention_class"] if activation["active"] else None
        looking = asyncio.get_running_loop().run_in_executor(
            self._thread, self._look, tenant, attention
        )
        indexes, faults, verdict = await looking
        problems += faults
        is_operator = tenant is self._tenants.operator
        return {
            "status": "degraded" if problems else "ok",
            "problems": problems,
            "model": self._model_name,
            "tenant": tenant.name,
            # As /server_info names them, which a tenant's key does not open.
            "engine": {
                "max_req_input_len": self._engine.context_length,
                "incremental_streaming_output": self._engine.incremental,
            },
            "activation": activation,
            "gate": {
                "on": bool(fusion.get("on")),
                "reason": fusion.get("off_reason", ""),
                "self_check": fusion.get("self_check", "not run"),
                "policy": self._settings.policy,
                "model": verdict,
            },
            "index": indexes,
            "prompt_date": self._prompt_date,
            # Of all callers together: the operator's business.
            "cache": {name: fusion.get(name, {}) for name in ("store", "counts") if is_operator},
            "limits": {
                name: value
                for name, value in asdict(self._settings).items()
                if name.startswith(("max_", "parse_"))
            },
        }

    def _look(
        self, tenant: Tenant, attention: str | None
    ) -> tuple[dict[str, Any], list[str], dict[str, Any] | None]:
        """Return the tenant's indexes, what is wrong with those it may know of, and the gate's verdict."""
        seen = self._tenants.all() if tenant is self._tenants.operator else [tenant]
        mine: dict[str, Any] = {}
        faults: list[str] = []
        for owner in seen:
            for name, index in self._indexes.of(owner).items():
                status = index.status()
                if owner is tenant:
                    mine[name] = status
                if not status["ok"]:
                    whose = "" if owner is tenant else f"tenant {owner.name}, "
                    faults.append(f"{whose}index {name}: {status['error']}")
        verdict = None
        if self._model_gate is not None and attention is not None:
            verdict = self._model_gate(attention)
        return mine, faults, verdict

    async def _scheduler(self) -> _Report:
        """Return the scheduler's last report; one question is under way for however many ask."""
        if self._last is None or time.monotonic() - self._last.at > FRESH_S:
            if self._asking is None or self._asking.done():
                self._asking = asyncio.get_running_loop().create_task(self._ask())
            await asyncio.wait({self._asking}, timeout=WAIT_S)
        return self._last or self._first()

    def _first(self) -> _Report:
        """Return what the scheduler said when the server became ready: load may have come at once."""
        info = self._engine.last_state
        problem = "" if info is not None else "the scheduler has not reported yet"
        return _Report(info=info, problem=problem, at=float("-inf"))

    async def _ask(self) -> None:
        try:
            info, problem = await self._engine.state(), ""
        except EngineError as error:
            info, problem = None, str(error)
        except Exception as error:
            logger.exception("The scheduler could not be asked for its report")
            info, problem = None, f"the scheduler could not be asked ({type(error).__name__})"
        self._last = _Report(info=info, problem=problem, at=time.monotonic())
