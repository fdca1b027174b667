"""The ``rag-pipeline`` app: its commands, their options, and the settings they start from.

Every command imports what it needs inside its function, so that ``--help`` starts as fast as
Python does.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from rag_pipeline.cli.cache_commands import cache_app
from rag_pipeline.cli.common import DEFAULT_CHUNK_TOKENS
from rag_pipeline.cli.config_commands import config_app
from rag_pipeline.cli.options import (
    DEFAULT_MODEL,
    EmbedderOption,
    IndexOption,
    JsonOption,
    ModelOption,
    OverlapOption,
    SearchOption,
    StoreOption,
    TopKOption,
)
from rag_pipeline.config import VERBOSE_VARIABLE

app = typer.Typer(
    name="rag-pipeline",
    help="RAG serving on SGLang: FAISS retrieval, chunk-KV cache, CacheBlend fusion.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(cache_app, name="cache")
app.add_typer(config_app, name="config")

_HELP = frozenset({"-h", "--help"})


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            help="Settings file in place of rag-pipeline.toml in this folder; off reads no file.",
        ),
    ] = None,
    verbose: Annotated[
        bool,
        typer.Option("--verbose", help="Show all that SGLang says; may stand behind the command."),
    ] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if verbose:
        os.environ[VERBOSE_VARIABLE] = "1"
        os.environ.pop("TQDM_DISABLE", None)
    if version:
        from importlib.metadata import version as installed_version

        typer.echo(f"rag-pipeline {installed_version('rag-pipeline')}")
        raise typer.Exit
    if not _HELP.isdisjoint(context.obj or ()):  # help must not fail on a fault in the settings
        return
    from rag_pipeline.cli.config import settings_in_force

    commands = getattr(context.command, "commands", {})
    in_force = settings_in_force(config, context.invoked_subcommand, commands)
    context.default_map = context.with_resource(in_force)


@app.command()
def demo(
    model: ModelOption = DEFAULT_MODEL,
    json_output: JsonOption = False,
) -> None:
    """Ingest a corpus that every CPython carries, ask three questions, show answers and sources."""
    from rag_pipeline.cli.demo import run_demo

    run_demo(model=model, json_output=json_output)


@app.command()
def ingest(
    paths: Annotated[
        list[str], typer.Argument(help="Files or folders, or the built-in corpus pydoc-topics.")
    ],
    index: IndexOption,
    chunk_tokens: Annotated[
        int, typer.Option(min=16, max=8192, help="Most tokens in a chunk.")
    ] = DEFAULT_CHUNK_TOKENS,
    overlap: OverlapOption = 0,
    embedder: EmbedderOption = None,
    factory: Annotated[
        str | None, typer.Option(help="FAISS index_factory string; default exact search.")
    ] = None,
    include: Annotated[
        list[str] | None, typer.Option(help="Glob of files to take; may be repeated.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Glob of files to leave; may be repeated.")
    ] = None,
    sync: Annotated[
        bool,
        typer.Option("--sync/--no-sync", help="Also remove documents that are gone from PATHS."),
    ] = False,
    warm: Annotated[
        bool, typer.Option("--warm/--no-warm", help="Then compute the chunks' KV for --model.")
    ] = False,
    store: StoreOption = None,
    model: ModelOption = DEFAULT_MODEL,
    json_output: JsonOption = False,
) -> None:
    """Read files, split them by the model's tokens, embed the chunks and write an index."""
    from rag_pipeline.cli.ingest import IngestOptions, run_ingest

    run_ingest(
        IngestOptions(
            paths=tuple(paths),
            index=index,
            chunk_tokens=chunk_tokens,
            overlap=overlap,
            embedder=embedder or None,
            factory=factory,
            include=tuple(include or ()),
            exclude=tuple(exclude or ()),
            sync=sync,
            warm=warm,
            store=store,
            model=model,
        ),
        json_output=json_output,
    )


@app.command()
def ask(
    question: Annotated[str, typer.Argument(help="The question.")],
    index: IndexOption,
    model: ModelOption = DEFAULT_MODEL,
    server: Annotated[
        str | None, typer.Option(help="URL of a running SGLang server to use.")
    ] = None,
    embedder: EmbedderOption = None,
    search: SearchOption = "dense",
    top_k: TopKOption = 4,
    policy: Annotated[
        str,
        typer.Option(
            help="How retrieved chunks are served: prefix (exact, RadixAttention alone), or the "
            "fusion policy full, reuse, cacheblend, epic, query, adaptive."
        ),
    ] = "prefix",
    ratio: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Share of reused tokens' work done anew."),
    ] = None,
    store: StoreOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, tokens.")] = 128,
    stream: Annotated[
        bool, typer.Option("--stream/--no-stream", help="Print the answer as it comes.")
    ] = False,
    json_output: JsonOption = False,
) -> None:
    """Answer a question from an index, with sources, token usage and timings."""
    from rag_pipeline.cli.ask import AskOptions, run_ask

    run_ask(
        AskOptions(
            question=question,
            index=index,
            model=model,
            server=server or None,
            embedder=embedder or None,
            search=search,
            top_k=top_k,
            policy=policy,
            ratio=ratio,
            store=store,
            max_new_tokens=max_new_tokens,
            stream=stream,
        ),
        json_output=json_output,
    )


@app.command()
def doctor(
    model: ModelOption = DEFAULT_MODEL,
    server: Annotated[
        str | None, typer.Option(help="Ask this running server instead of starting an engine.")
    ] = None,
    json_output: JsonOption = False,
) -> None:
    """Start an engine and show what really runs: platform, attention backend, plugin, versions."""
    from rag_pipeline.cli.doctor import run_doctor

    run_doctor(model=model, server=server or None, json_output=json_output)


_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}
"""Options that this command does not know are SGLang's, whose own parser refuses unknown ones."""


@app.command(context_settings=_PASS_ON)
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
    search: SearchOption = "dense",
    top_k: TopKOption = 4,
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
            search=search,
            top_k=top_k,
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


_FORWARD = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
"""The evaluation's own parser reads the words behind these commands, and refuses unknown ones."""


@app.command("eval", context_settings=_FORWARD)
def evaluate(context: typer.Context) -> None:
    """Measure answer quality and cost of every mode; `eval gate` checks a model before it serves."""
    from rag_eval.fidelity import main as run

    raise typer.Exit(run(context.args))


@app.command(context_settings=_FORWARD)
def bench(context: typer.Context) -> None:
    """Measure speed (ttft, throughput, store) or reliability; nothing of answer quality."""
    benchmarks = {
        "ttft": "rag_eval.benchmarks.ttft",
        "throughput": "rag_eval.benchmarks.throughput",
        "store": "rag_eval.benchmarks.store",
        "reliability": "rag_eval.reliability.command",
    }
    name, *words = context.args or ["--help"]
    if name in ("-h", "--help"):
        typer.echo(
            f"Usage: rag-pipeline bench {'|'.join(benchmarks)} [OPTIONS]; --help behind each"
        )
        return
    if name not in benchmarks:
        from rag_pipeline.errors import RagPipelineError

        raise RagPipelineError(f"no benchmark {name!r}; choose one of {', '.join(benchmarks)}")
    from importlib import import_module

    raise typer.Exit(import_module(benchmarks[name]).main(words))
