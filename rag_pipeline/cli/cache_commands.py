"""The commands ``rag-pipeline cache ...`` and their options; :mod:`.cache` does the work.

As in :mod:`.app`, what a command needs is imported when it runs.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from rag_pipeline.cli.options import (
    DEFAULT_MODEL,
    IndexOption,
    JsonOption,
    ModelOption,
    StoreOption,
)

cache_app = typer.Typer(
    help="The chunk-KV folder: warm, stats, ls, pin, evict, verify.", rich_markup_mode=None
)


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
    _cache("stats", store=store, json_output=json_output)


@cache_app.command("ls")
def cache_ls(store: StoreOption = None, json_output: JsonOption = False) -> None:
    """List the chunks."""
    _cache("ls", store=store, json_output=json_output)


@cache_app.command("verify")
def cache_verify(store: StoreOption = None, json_output: JsonOption = False) -> None:
    """Read every file against its checksum and remove damaged ones."""
    _cache("verify", store=store, json_output=json_output)


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
    _cache("unpin" if unpin else "pin", store=store, keys=tuple(keys), json_output=json_output)


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
    _cache("evict", store=store, keys=words, max_bytes=max_bytes, json_output=json_output)


def _cache(action: str, **options: Any) -> None:
    from rag_pipeline.cli.cache import run_cache

    run_cache(action, **options)
