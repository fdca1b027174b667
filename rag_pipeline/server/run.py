"""Put everything together and serve until told to stop."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from rag_pipeline.prompt_layout import PromptBuilder
from rag_pipeline.server.conversation import QUESTION_TEMPLATE
from rag_pipeline.server.guard import make_guard
from rag_pipeline.server.indexes import EmbedderPool, IndexTable
from rag_pipeline.server.ingest_jobs import IngestJobs
from rag_pipeline.server.page import is_page_path, make_page_router
from rag_pipeline.server.routes import make_router
from rag_pipeline.server.service import RagService
from rag_pipeline.sglang_plugin.http_access import AccessRules
from rag_pipeline.sglang_plugin.http_server import ServerFacts, run_http_server
from rag_pipeline.sglang_plugin.served_engine import ServedEngine

if TYPE_CHECKING:
    from rag_pipeline.server.settings import ServerSettings
    from rag_pipeline.server.tenants import Tenants


def serve(
    settings: ServerSettings,
    tenants: Tenants,
    words: Sequence[str],
    *,
    on_ready: Callable[[ServerFacts], None],
    model_gate: Callable[[str], dict[str, Any]] | None = None,
) -> None:
    """Serve a model with the RAG routes until told to stop.

    Parameters
    ----------
    settings
        Of the RAG routes.
    tenants
        Who may use which index.
    words
        SGLang's flags.
    on_ready
        Called when requests can be answered.
    model_gate
        Looks up the model gate's verdict for an attention class, for health.

    Raises
    ------
    EngineError
        One line: why the server did not start.
    RagPipelineError, RetrievalError
        A model, an embedder or an index that cannot be used.
    """
    builder = PromptBuilder(settings.model, question_template=QUESTION_TEMPLATE)
    embedders = EmbedderPool(settings.embedder)
    indexes = IndexTable(tenants.all(), embedders)
    for tenant in tenants.all():
        for index in indexes.of(tenant).values():
            index.current()  # a damaged index is refused now, not at the first question

    jobs = IngestJobs(settings)

    def attach(app: Any, engine: ServedEngine, facts: ServerFacts) -> None:
        service = RagService(
            settings=settings,
            engine=engine,
            builder=builder,
            tenants=tenants,
            indexes=indexes,
            jobs=jobs,
            model_name=facts.model_name,
            model_gate=model_gate,
        )
        app.state.rag_guard = make_guard(host=facts.host, has_key=facts.has_api_key)
        app.include_router(make_router(service))
        app.include_router(make_page_router())
        jobs.resume(
            {
                (tenant.name, name): index
                for tenant in tenants.all()
                for name, index in indexes.of(tenant).items()
            }
        )
        # The embedder's weights load while the engine starts.
        threading.Thread(target=_warm, args=(embedders,), name="warm-embedder", daemon=True).start()

    rules = AccessRules(is_public=is_page_path, accepts=tenants.accepts, salt_of=tenants.salt_of)
    try:
        run_http_server(settings.model, words, attach=attach, rules=rules, on_ready=on_ready)
    finally:
        jobs.close()


def _warm(embedders: EmbedderPool) -> None:
    embedders.get().encode_query("warm up")
