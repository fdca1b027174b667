"""Put everything together and serve until told to stop."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from rag_pipeline.erasure import default_stores, make_eraser
from rag_pipeline.prompt_layout import PromptBuilder
from rag_pipeline.server.conversation import QUESTION_TEMPLATE
from rag_pipeline.server.guard import make_guard
from rag_pipeline.server.indexes import EmbedderPool, IndexTable, ServedIndex
from rag_pipeline.server.ingest_jobs import IngestJobs
from rag_pipeline.server.page import is_page_path, make_page_router
from rag_pipeline.server.routes import make_router
from rag_pipeline.server.service import RagService
from rag_pipeline.sglang_plugin.http_access import AccessRules
from rag_pipeline.sglang_plugin.http_server import ServerFacts, run_http_server
from rag_pipeline.sglang_plugin.served_engine import ServedEngine
from retrievers import RetrievalError, finish_removals

if TYPE_CHECKING:
    from rag_pipeline.server.settings import ServerSettings
    from rag_pipeline.server.tenants import Tenants
    from retrievers import Erase, Removal

logger = logging.getLogger(__name__)


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
    served = [index for tenant in tenants.all() for index in indexes.of(tenant).values()]
    erase_kv = make_eraser(*default_stores())

    def erase(removal: Removal) -> None:
        erase_kv(removal)
        builder.forget_texts()
        for index in served:
            if index.folder == removal.old.parent:
                index.current()  # lets go of the files of the state before

    for index in served:
        _finish_removals(index, erase)
        index.current()  # a damaged index is refused now, not at the first question

    jobs = IngestJobs(settings, erase=erase)

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


def _finish_removals(index: ServedIndex, erase: Erase) -> None:
    """Do what a killed process left undone; a damaged or busy index says so when it is opened or changed."""
    try:
        if index.manifest() is not None:
            finish_removals(index.folder, erase=erase)
    except RetrievalError as error:
        logger.warning("Index %r: %s", index.name, error)


def _warm(embedders: EmbedderPool) -> None:
    embedders.get().encode_query("warm up")
