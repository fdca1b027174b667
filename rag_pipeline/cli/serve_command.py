"""The options of ``rag-pipeline serve``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rag_pipeline.cli.common import DEFAULT_CHUNK_TOKENS, MEMORY_DEFAULTS, refuse_unread_memory
from rag_pipeline.cli.options import (
    DEFAULT_MODEL,
    DocumentOrderOption,
    EmbedderOption,
    MemoryBlockOption,
    MemoryBudgetOption,
    MemoryEpisodesOption,
    MemoryOption,
    ModelOption,
    OverlapOption,
    SearchOption,
    StoreOption,
    TopKOption,
)

PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}
"""Options that this command does not know are SGLang's, whose own parser refuses unknown ones."""


def serve(
    context: typer.Context,
    # Not called `index`: a setting of that name is one folder, and this option is a list.
    indexes: Annotated[
        list[str],
        typer.Option(
            "--index", help="Index folder or NAME=FOLDER; may be repeated, first default."
        ),
    ],
    model: ModelOption = DEFAULT_MODEL,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 30000,
    tenants: Annotated[
        Path | None, typer.Option(help="JSON file of further keys, each with its own indexes.")
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(help="The operator's key; better as a file, or RAG_PIPELINE_API_KEY."),
    ] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="File of the operator's key.")] = None,
    admin_api_key: Annotated[
        str | None,
        typer.Option(help="Key of SGLang's administrative routes; or RAG_PIPELINE_ADMIN_API_KEY."),
    ] = None,
    admin_api_key_file: Annotated[
        Path | None, typer.Option(help="File of the administrator's key.")
    ] = None,
    unprotected: Annotated[
        bool,
        typer.Option(
            "--unprotected-without-key",
            help="Let whoever reaches --host read, add and delete all documents.",
        ),
    ] = False,
    embedder: EmbedderOption = None,
    policy: Annotated[
        str, typer.Option(help="For requests that name none: prefix or a fusion policy.")
    ] = "query",
    attention: Annotated[
        str | None,
        typer.Option(
            help="Attention method of requests that name none, of any client (fusion.attention): dense, sale, power, ..."
        ),
    ] = None,
    tpla: Annotated[
        str,
        typer.Option(
            help="Basis in which the latents of an MLA model are sliced over the ranks of --tp-size (CPU): pca, identity, "
            "..., off."
        ),
    ] = "off",
    memory: MemoryOption = "off",
    memory_budget: MemoryBudgetOption = MEMORY_DEFAULTS.budget_tokens,
    memory_episodes: MemoryEpisodesOption = MEMORY_DEFAULTS.episodes,
    memory_block: MemoryBlockOption = MEMORY_DEFAULTS.block_tokens,
    search: SearchOption = "dense",
    top_k: TopKOption = 4,
    document_order: DocumentOrderOption = "retrieved",
    chunk_tokens: Annotated[
        int, typer.Option(min=16, max=8192, help="Most tokens in a chunk of a new index.")
    ] = DEFAULT_CHUNK_TOKENS,
    overlap: OverlapOption = 0,
    max_upload_mb: Annotated[int, typer.Option(min=1, max=4096, help="Largest upload.")] = 16,
    parse_seconds: Annotated[
        int, typer.Option(min=1, max=3600, help="CPU seconds to read and split one file.")
    ] = 60,
    parse_memory_mb: Annotated[int, typer.Option(min=256, help="Memory for that.")] = 1024,
    job_seconds: Annotated[
        int, typer.Option(min=1, max=86400, help="Longest work on one upload.")
    ] = 1800,
    max_index_chunks: Annotated[
        int, typer.Option(min=1, help="Chunks in one index; an upload beyond it is refused.")
    ] = 1_000_000,
    max_searches: Annotated[
        int, typer.Option(min=1, help="Searches under way, questions apart; one more gets 503.")
    ] = 64,
    max_questions: Annotated[
        int,
        typer.Option(
            min=1, help="Questions under way; one more gets 503. Raise --max-queued-requests too."
        ),
    ] = 128,
    max_connections: Annotated[int, typer.Option(min=1, help="Connections open at once.")] = 1024,
    max_body_mb: Annotated[
        int, typer.Option(min=1, max=4096, help="Largest request to SGLang's own routes.")
    ] = 64,
    stop_seconds: Annotated[
        int, typer.Option(min=0, max=3600, help="For requests to end after SIGTERM.")
    ] = 15,
    automatic: Annotated[
        bool | None,
        typer.Option(
            "--automatic/--no-automatic",
            help="Look for stored chunks in every prompt, unasked (fusion.automatic).",
        ),
    ] = None,
    store: StoreOption = None,
    kv_remote: Annotated[
        str | None,
        typer.Option(
            help="Store of chunk KV that several servers share (fusion.remote): valkey://host:port, "
            "hicache+BACKEND://...",
        ),
    ] = None,
) -> None:
    """Start SGLang's server with the RAG routes and the page; other flags go to SGLang."""
    from rag_pipeline.cli.serve import ServeOptions, run_serve

    refuse_unread_memory(context)
    run_serve(
        ServeOptions(
            index=tuple(indexes),
            model=model,
            host=host,
            port=port,
            tenants=tenants,
            api_key=api_key,
            api_key_file=api_key_file,
            admin_api_key=admin_api_key,
            admin_api_key_file=admin_api_key_file,
            unprotected=unprotected,
            embedder=embedder,
            policy=policy,
            attention=attention,
            tpla=tpla,
            memory=memory,
            memory_budget=memory_budget,
            memory_episodes=memory_episodes,
            memory_block=memory_block,
            search=search,
            top_k=top_k,
            document_order=document_order,
            chunk_tokens=chunk_tokens,
            overlap=overlap,
            max_upload_mb=max_upload_mb,
            parse_seconds=parse_seconds,
            parse_memory_mb=parse_memory_mb,
            job_seconds=job_seconds,
            max_index_chunks=max_index_chunks,
            max_searches=max_searches,
            max_questions=max_questions,
            max_connections=max_connections,
            max_body_mb=max_body_mb,
            stop_seconds=stop_seconds,
            automatic=automatic,
            store=store,
            kv_remote=kv_remote,
            words=tuple(context.args),
        )
    )
