"""The ``rag-pipeline`` app: its commands, their options, and the settings they start from.

Every command imports what it needs inside its function, so that ``--help`` starts as fast as
Python does.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from rag_pipeline.cli.cache_commands import cache_app
from rag_pipeline.cli.common import DEFAULT_CHUNK_TOKENS, MEMORY_DEFAULTS, refuse_unread_memory
from rag_pipeline.cli.config_commands import config_app
from rag_pipeline.cli.convert_commands import convert_app
from rag_pipeline.cli.options import (
    DEFAULT_MODEL,
    DocumentOrderOption,
    EmbedderOption,
    IndexOption,
    JsonOption,
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
from rag_pipeline.cli.serve_command import PASS_ON, serve
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
app.add_typer(convert_app, name="convert")

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
    attention: Annotated[
        str | None,
        typer.Option(
            help="Which keys computed tokens read: dense (all), or another method; fusion.attention when unset."
        ),
    ] = None,
    document_order: DocumentOrderOption = "retrieved",
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
            attention=attention or "",
            document_order=document_order,
            store=store,
            max_new_tokens=max_new_tokens,
            stream=stream,
        ),
        json_output=json_output,
    )


@app.command()
def chat(
    context: typer.Context,
    model: ModelOption = DEFAULT_MODEL,
    memory: MemoryOption = "off",
    memory_budget: MemoryBudgetOption = MEMORY_DEFAULTS.budget_tokens,
    memory_episodes: MemoryEpisodesOption = MEMORY_DEFAULTS.episodes,
    memory_block: MemoryBlockOption = MEMORY_DEFAULTS.block_tokens,
    system: Annotated[
        str | None, typer.Option(help="What the model is told before the conversation.")
    ] = None,
    server: Annotated[
        str | None, typer.Option(help="URL of a running server to chat through.")
    ] = None,
    history: Annotated[
        Path | None,
        typer.Option(help="JSON Lines file to go on from; each turn is appended to it."),
    ] = None,
    store: StoreOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, tokens.")] = 256,
    json_output: Annotated[
        bool, typer.Option("--json", help="Print one JSON object per turn on stdout.")
    ] = False,
) -> None:
    """Chat in the terminal or through a pipe; with --memory from a cache of fixed size."""
    from rag_pipeline.cli.chat import ChatOptions, run_chat

    refuse_unread_memory(context)
    run_chat(
        ChatOptions(
            model=model,
            memory=memory,
            memory_budget=memory_budget,
            memory_episodes=memory_episodes,
            memory_block=memory_block,
            system=system,
            server=server or None,
            history=history,
            store=store,
            max_new_tokens=max_new_tokens,
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


app.command(context_settings=PASS_ON)(serve)

_FORWARD = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
"""The evaluation's own parser reads the words behind these commands, and refuses unknown ones."""


@app.command("eval", context_settings=_FORWARD)
def evaluate(context: typer.Context) -> None:
    """Measure answer quality and cost of every mode; `eval gate` checks a model, `eval conversation` memories."""
    from rag_eval.fidelity import main as run

    raise typer.Exit(run(context.args))


@app.command(context_settings=_FORWARD)
def bench(context: typer.Context) -> None:
    """Measure speed (ttft, throughput, store, tiers, attention) or reliability; nothing of answer quality."""
    benchmarks = {
        "ttft": "rag_eval.benchmarks.ttft",
        "throughput": "rag_eval.benchmarks.throughput",
        "store": "rag_eval.benchmarks.store",
        "tiers": "rag_eval.benchmarks.tiers",
        "attention": "rag_eval.benchmarks.prefill_methods",
        "reliability": "rag_eval.reliability.command",
    }
    _run_named("bench", "benchmark", benchmarks, context.args)


@app.command(context_settings=_FORWARD)
def attention(context: typer.Context) -> None:
    """Find the thresholds that a model's heads allow sparse attention (calibrate)."""
    modules = {"calibrate": "rag_eval.calibration.command"}
    _run_named("attention", "command", modules, context.args)


@app.command(context_settings=_FORWARD)
def memory(context: typer.Context) -> None:
    """Measure how far a model's layers depend on distant tokens (calibrate)."""
    modules = {"calibrate": "rag_eval.calibration.layers_command"}
    _run_named("memory", "command", modules, context.args)


@app.command(context_settings=_FORWARD)
def tpla(context: typer.Context) -> None:
    """Measure the latents of an MLA model, for an engine that slices them over its ranks (calibrate)."""
    modules = {"calibrate": "rag_eval.tpla.calibrate_command"}
    _run_named("tpla", "command", modules, context.args)


@app.command(context_settings=_FORWARD)
def simulate(context: typer.Context) -> None:
    """Play a trace of requests through a model of the store (tiers); needs no engine."""
    _run_named("simulate", "simulation", {"tiers": "rag_eval.simulator.command"}, context.args)


def _run_named(command: str, kind: str, modules: dict[str, str], given: list[str]) -> NoReturn:
    """Let the module that the first word names run with the others."""
    name, *words = given or ["--help"]
    if name in ("-h", "--help"):
        typer.echo(
            f"Usage: rag-pipeline {command} {'|'.join(modules)} [OPTIONS]; --help behind each"
        )
        raise typer.Exit
    if name not in modules:
        from rag_pipeline.errors import RagPipelineError

        raise RagPipelineError(f"no {kind} {name!r}; choose one of {', '.join(modules)}")
    from importlib import import_module

    # Not typer's own exit: one that was interrupted has said so.
    raise SystemExit(import_module(modules[name]).main(words))
