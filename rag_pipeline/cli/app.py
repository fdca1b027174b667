"""Commands, their options, and the one place where a user's mistake becomes one line.

Every command imports what it needs inside its function, so that ``--help`` starts as fast as
Python does.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from rag_pipeline.cli.common import DEFAULT_CHUNK_TOKENS, DEFAULT_EMBEDDER

# typer carries its own copy of click and exports only the leaves; the base of `BadParameter` is
# what every parsing mistake (unknown option, missing argument, bad value) is an instance of.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]

app = typer.Typer(
    name="rag-pipeline",
    help="RAG serving on SGLang: FAISS retrieval, chunk-KV cache, CacheBlend fusion.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

DEFAULT_MODEL = "smollm2-135m"
_HELP = frozenset({"-h", "--help"})

IndexOption = Annotated[Path, typer.Option("--index", help="Index folder.")]
ModelOption = Annotated[
    str, typer.Option("--model", help="Hub id, model folder, GGUF file, or packaged name.")
]
EmbedderOption = Annotated[
    str | None,
    typer.Option(
        "--embedder",
        help=f"Hub id, folder or packaged name; default {DEFAULT_EMBEDDER}, "
        "or the one the index was built with.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
TopKOption = Annotated[int, typer.Option("--top-k", min=1, max=64, help="Chunks to retrieve.")]


StoreOption = Annotated[
    Path | None,
    typer.Option("--store", help="Folder of chunk KV; default below RAG_PIPELINE_HOME."),
]

cache_app = typer.Typer(
    help="The chunk-KV folder: warm, stats, ls, pin, evict, verify.", rich_markup_mode=None
)
app.add_typer(cache_app, name="cache")
config_app = typer.Typer(
    help="Settings by file and environment: show, env, init.", rich_markup_mode=None
)
app.add_typer(config_app, name="config")


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
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
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
    overlap: Annotated[int, typer.Option(min=0, help="Tokens shared by neighbours.")] = 0,
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
    search: Annotated[str, typer.Option(help="dense, bm25 or hybrid.")] = "dense",
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
    embedder: EmbedderOption = None,
    policy: Annotated[
        str, typer.Option(help="For requests that name none: prefix or a fusion policy.")
    ] = "query",
    search: Annotated[str, typer.Option(help="dense, bm25 or hybrid.")] = "dense",
    top_k: TopKOption = 4,
    chunk_tokens: Annotated[
        int, typer.Option(min=16, max=8192, help="Most tokens in a chunk of a new index.")
    ] = DEFAULT_CHUNK_TOKENS,
    overlap: Annotated[int, typer.Option(min=0, help="Tokens shared by neighbours.")] = 0,
    max_upload_mb: Annotated[int, typer.Option(min=1, max=4096, help="Largest upload.")] = 16,
    parse_seconds: Annotated[
        int, typer.Option(min=1, max=3600, help="CPU seconds to parse one file.")
    ] = 30,
    parse_memory_mb: Annotated[int, typer.Option(min=128, help="Memory to parse one file.")] = 1024,
    store: StoreOption = None,
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
            embedder=embedder,
            policy=policy,
            search=search,
            top_k=top_k,
            chunk_tokens=chunk_tokens,
            overlap=overlap,
            max_upload_mb=max_upload_mb,
            parse_seconds=parse_seconds,
            parse_memory_mb=parse_memory_mb,
            store=store,
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
    """Measure speed alone: ttft, throughput (arrivals at a server), store (save, load, evict)."""
    names = ("ttft", "throughput", "store")
    benchmarks = {name: f"rag_eval.benchmarks.{name}" for name in names}
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


@config_app.command("show")
def config_show(context: typer.Context, json_output: JsonOption = False) -> None:
    """Print every setting's value, and the file or variable it came from."""
    from rag_pipeline.cli.config import run_show

    run_show(file=context.find_root().params["config"], json_output=json_output)


@config_app.command("env")
def config_env(context: typer.Context) -> None:
    """Print shell lines that give an SGLang server started by hand the same settings."""
    from rag_pipeline.cli.config import run_env

    run_env(file=context.find_root().params["config"])


@config_app.command("init")
def config_init(
    path: Annotated[Path, typer.Argument(help="File to write, or its folder.")] = Path(),
) -> None:
    """Write a rag-pipeline.toml in which every key stands with its default, commented out."""
    from rag_pipeline.cli.config import run_init

    run_init(path)


@cache_app.command("warm")
def cache_warm(
    index: IndexOption,
    store: StoreOption = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many chunks.")] = None,
    model: ModelOption = DEFAULT_MODEL,
    json_output: JsonOption = False,
) -> None:
    """Compute the KV of an index's chunks ahead of the questions."""
    from rag_pipeline.cli.cache import print_warm, run_warm

    report = run_warm(index=index, model=model, store=store, limit=limit)
    print_warm(report, json_output=json_output)


@cache_app.command("stats")
def cache_stats(store: StoreOption = None, json_output: JsonOption = False) -> None:
    """Count chunks, tokens and bytes."""
    _cache("stats", store, json_output=json_output)


@cache_app.command("ls")
def cache_ls(store: StoreOption = None, json_output: JsonOption = False) -> None:
    """List the chunks."""
    _cache("ls", store, json_output=json_output)


@cache_app.command("verify")
def cache_verify(store: StoreOption = None, json_output: JsonOption = False) -> None:
    """Read every file against its checksum and remove damaged ones."""
    _cache("verify", store, json_output=json_output)


@cache_app.command("pin")
def cache_pin(
    keys: Annotated[
        list[str], typer.Argument(metavar="KEY...", help="Keys of chunks, or their first digits.")
    ],
    unpin: Annotated[bool, typer.Option("--unpin", help="Make them evictable again.")] = False,
    store: StoreOption = None,
    json_output: JsonOption = False,
) -> None:
    """Keep chunks: no eviction removes them, and engines pin them in memory at their next start."""
    _cache("unpin" if unpin else "pin", store, tuple(keys), json_output=json_output)


@cache_app.command("evict")
def cache_evict(
    keys: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY...]", help="Keys of chunks, or their first digits."),
    ] = None,
    key: Annotated[
        list[str] | None, typer.Option(help="The same as an option; may be repeated.")
    ] = None,
    max_bytes: Annotated[
        int | None,
        typer.Option(min=0, help="Remove the oldest chunks until the others weigh no more."),
    ] = None,
    store: StoreOption = None,
    json_output: JsonOption = False,
) -> None:
    """Remove chunks; pinned ones stay and are named."""
    words = (*(keys or ()), *(key or ()))
    if not words and max_bytes is None:
        raise typer.BadParameter("Give keys (KEY... or --key), or --max-bytes")
    _cache("evict", store, words, max_bytes=max_bytes, json_output=json_output)


def _cache(
    action: str,
    store: Path | None,
    keys: tuple[str, ...] = (),
    *,
    max_bytes: int | None = None,
    json_output: bool,
) -> None:
    from rag_pipeline.cli.cache import run_cache

    run_cache(action, store=store, keys=keys, max_bytes=max_bytes, json_output=json_output)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    arguments
        Words after the program's name; ``None`` takes ``sys.argv``.

    Returns
    -------
    int
        0 on success, 1 for a fault in the input, 2 for a mistake in the options, 130 on Ctrl-C.
    """
    command = typer.main.get_command(app)
    # Progress is shown by this program; the bars that libraries draw, in child processes too, are not.
    os.environ.setdefault("TQDM_DISABLE", "1")
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        result = command.main(
            args=words or ["--help"],
            prog_name="rag-pipeline",
            standalone_mode=False,
            obj=words,
        )
    except _UsageError as error:
        # Formatted by hand: typer's own rendering is a box of several lines.
        return _fail(_usage_line(error), code=2)
    except SystemExit as stop:  # from the evaluation's parser, which has said why
        return stop.code if isinstance(stop.code, int) else 1
    except (typer.Abort, KeyboardInterrupt):
        return _fail("interrupted; nothing that was finished is lost", code=130)
    except _user_errors() as error:
        return _fail(str(error), code=1)
    return result if isinstance(result, int) else 0


def _user_errors() -> tuple[type[Exception], ...]:
    from rag_pipeline.errors import RagPipelineError
    from retrievers.errors import RetrievalError

    return (RagPipelineError, RetrievalError)


def _usage_line(error: Exception) -> str:
    """Say what was wrong with the words given, and where the allowed ones are listed."""
    context = getattr(error, "ctx", None)
    where = context.command_path if context is not None else "rag-pipeline"
    text: str = error.format_message()  # type: ignore[attr-defined]
    return f"{text.rstrip('.')}; `{where} --help` lists what is allowed"


def _fail(message: str, *, code: int) -> int:
    line = " ".join(message.split())
    sys.stderr.write(f"error: {line}\n")
    sys.stderr.flush()
    return code
