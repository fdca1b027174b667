"""Put everything together and serve until told to stop."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.exceptions import HTTPException

from chunk_cache import tenant_mark
from rag_pipeline.erasure import make_eraser
from rag_pipeline.notices import Reach
from rag_pipeline.prompts.builder import PromptBuilder
from rag_pipeline.server.cache_routes import make_cache_router
from rag_pipeline.server.embedders import EmbedderPool
from rag_pipeline.server.errors import ApiError, answer_unknown_route
from rag_pipeline.server.guard import SEARCH, Guard, GuardRules
from rag_pipeline.server.health import Health
from rag_pipeline.server.indexes import IndexTable, ServedIndex
from rag_pipeline.server.ingest_jobs import IngestJobs
from rag_pipeline.server.page import make_page_router
from rag_pipeline.server.question_part import QUESTION_TEMPLATE
from rag_pipeline.server.request_log import log_requests
from rag_pipeline.server.routes import make_router
from rag_pipeline.server.service import RagService
from rag_pipeline.server.stock_faults import answer_stock_fault
from rag_pipeline.sglang_plugin import FusionConfig
from rag_pipeline.sglang_plugin.http import chat_memory
from rag_pipeline.sglang_plugin.http.served_engine import ServedEngine
from rag_pipeline.sglang_plugin.http.server import (
    HttpLimits,
    ServerFacts,
    ServerKeys,
    run_http_server,
)
from retrievers import IndexBusyError, RetrievalError, finish_removals

if TYPE_CHECKING:
    from rag_pipeline.server.memories import Memories
    from rag_pipeline.server.settings import ServerSettings
    from rag_pipeline.server.tenants import Tenants
    from retrievers import Erase, Removal

logger = logging.getLogger(__name__)


def serve(
    settings: ServerSettings,
    tenants: Tenants,
    words: Sequence[str],
    *,
    keys: ServerKeys,
    on_ready: Callable[[ServerFacts], None],
    model_gate: Callable[[str], dict[str, Any]] | None = None,
) -> None:
    """Serve a model with the RAG routes until told to stop.

    Parameters
    ----------
    settings : ServerSettings
        Of the RAG routes.
    tenants : Tenants
        Who may use which index.
    words : sequence of str
        SGLang's flags.
    keys : ServerKeys
        Of the operator and of the administrator.
    on_ready : callable
        Called when requests can be answered.
    model_gate : callable, optional
        Looks up the model gate's verdict for an attention class, for health.

    Raises
    ------
    EngineError
        One line: why the server did not start.
    RagPipelineError, RetrievalError
        A model, an embedder or an index that cannot be used.
    """
    builder = PromptBuilder(
        settings.model,
        question_template=QUESTION_TEMPLATE,
        document_order=settings.document_order,
    )
    embedders = EmbedderPool(settings.embedder)
    indexes = IndexTable(tenants.all(), embedders)
    served = [index for tenant in tenants.all() for index in indexes.of(tenant).values()]
    erasers = _erasers(tenants)

    def erase(removal: Removal) -> None:
        erasers.get(removal.old.parent, erasers[None])(removal)
        builder.forget_texts()
        for index in served:
            if index.folder == removal.old.parent:
                with suppress(ApiError):
                    index.current()  # lets go of the files of the state before

    for index in served:
        _finish_removals(index, erase)
    _open_indexes(tenants, indexes)

    jobs = IngestJobs(settings, erase=erase)

    memories: Memories | None = None

    def ready(facts: ServerFacts) -> None:
        assert memories is not None
        memories.check()
        on_ready(facts)

    def attach(app: Any, engine: ServedEngine, facts: ServerFacts) -> Guard:
        nonlocal memories
        service = RagService(
            settings=settings,
            engine=engine,
            builder=builder,
            num_tenants=len(tenants),
            indexes=indexes,
            jobs=jobs,
            model_name=facts.model_name,
            embedders=embedders,
            health=Health(
                engine=engine,
                settings=settings,
                tenants=tenants,
                indexes=indexes,
                model_name=facts.model_name,
                prompt_date=builder.tokenizer.date_policy,
                model_gate=model_gate,
            ),
        )
        memories = service.memories
        chat_memory.register(memories)
        app.include_router(make_router(service))
        app.include_router(make_cache_router(service))
        app.include_router(make_page_router())
        # What SGLang's routes raise is FastAPI's own exception, for which SGLang has a handler.
        app.add_exception_handler(HTTPException, answer_unknown_route)
        app.add_exception_handler(Exception, answer_stock_fault)
        # The embedder's weights load while the engine starts.
        threading.Thread(target=embedders.warm, name="warm-embedder", daemon=True).start()
        jobs.resume(
            {
                (tenant.name, name): index
                for tenant in tenants.all()
                for name, index in indexes.of(tenant).items()
            }
        )
        rules = GuardRules(
            host=facts.host,
            tenants=tenants,
            admin_key=keys.admin_api_key,
            open_to_network=settings.open_to_network,
            max_body_bytes=settings.max_body_bytes,
            body_limits={"/v1/rag/documents": settings.max_upload_bytes},
            max_requests=settings.max_requests,
            max_held_bytes=settings.max_held_bytes,
            max_questions=settings.max_questions,
            rooms={SEARCH: service.check_room},
            closed=facts.closed,
        )
        guard = Guard(app, rules)
        guard.background.append(memories.close)
        return guard

    log_requests()
    limits = HttpLimits(max_connections=settings.max_connections, stop_s=settings.stop_seconds)
    try:
        run_http_server(
            settings.model, words, attach=attach, keys=keys, limits=limits, on_ready=ready
        )
    finally:
        jobs.close()


def _erasers(tenants: Tenants) -> dict[Path | None, Erase]:
    """What erases from chunk KV what a tenant's index no longer holds, by the index's folder; None for the operator's."""
    stores = FusionConfig.from_env().store_folders()
    marks = {tenant_mark(tenant.salt) for tenant in tenants.all()} - {""}
    erasers: dict[Path | None, Erase] = {None: make_eraser(*stores)}
    for tenant in tenants.all():
        if tenant.salt:
            mark = tenant_mark(tenant.salt)
            reach = Reach(tenant=mark, spared=frozenset(marks - {mark}))
            erasers |= dict.fromkeys(tenant.indexes.values(), make_eraser(*stores, reach=reach))
    return erasers


def _finish_removals(index: ServedIndex, erase: Erase) -> None:
    """Do what a killed process left undone; a damaged or busy index says so when it is opened or changed."""
    try:
        finish_removals(index.folder, erase=erase)
    except IndexBusyError:
        logger.info("Index %r is being changed; that removes what a crash left", index.name)
    except RetrievalError as error:
        logger.warning("Index %r: %s", index.name, error)


def _open_indexes(tenants: Tenants, indexes: IndexTable) -> None:
    """Find a damaged index now, not at the first question; with tenants it stops its owner only."""
    for tenant in tenants.all():
        for index in indexes.of(tenant).values():
            try:
                if index.current() is None:
                    # To be uploaded into, or mistyped.
                    logger.warning(
                        "Index %r is new and empty: %s holds none yet", index.name, index.folder
                    )
            except ApiError as refusal:
                if not len(tenants):
                    raise RetrievalError(index.fault or str(refusal)) from refusal
