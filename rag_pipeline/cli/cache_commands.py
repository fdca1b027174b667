"""The commands ``rag-pipeline cache ...`` and their options; :mod:`.cache` does the work.

As in :mod:`.app`, what a command needs is imported when it runs.
"""

from __future__ import annotations

from pathlib import Path
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
    help="The chunk cache, a folder or a running server: stats, ls, warm, pin, unpin, prefetch, evict, verify.",
    rich_markup_mode=None,
)

UrlOption = Annotated[
    str | None, typer.Option("--url", help="A running server, instead of the folder.")
]
AdminKeyOption = Annotated[
    Path | None,
    typer.Option(
        "--admin-api-key-file",
        help="Key for --url; default RAG_PIPELINE_ADMIN_API_KEY or RAG_PIPELINE_API_KEY.",
    ),
]
TierOption = Annotated[
    str | None,
    typer.Option("--tier", help="With --url: only this tier, such as memory, disk or remote."),
]
KeysArgument = Annotated[
    list[str], typer.Argument(metavar="KEY...", help="Keys of chunks, or their first digits.")
]


@cache_app.command("warm")
def cache_warm(
    index: IndexOption,
    store: StoreOption = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many chunks.")] = None,
    model: ModelOption = DEFAULT_MODEL,
    url: UrlOption = None,
    json_output: JsonOption = False,
) -> None:
    """Compute the KV of an index's chunks ahead of the questions; the key for --url is RAG_PIPELINE_API_KEY."""
    from rag_pipeline.cli.cache import print_warm, run_warm

    _one_place(url, store)
    report = run_warm(index=index, model=model, store=store, limit=limit, url=url)
    print_warm(report, json_output=json_output)


@cache_app.command("stats")
def cache_stats(
    store: StoreOption = None,
    url: UrlOption = None,
    admin_api_key_file: AdminKeyOption = None,
    json_output: JsonOption = False,
) -> None:
    """Count chunks, tokens and bytes; on a server hits and queues of every tier too."""
    _cache("stats", store, url, admin_api_key_file, json_output)


@cache_app.command("ls")
def cache_ls(
    store: StoreOption = None,
    url: UrlOption = None,
    tier: TierOption = None,
    admin_api_key_file: AdminKeyOption = None,
    json_output: JsonOption = False,
) -> None:
    """List the chunks."""
    _cache("ls", store, url, admin_api_key_file, json_output, tier=tier)


@cache_app.command("verify")
def cache_verify(
    store: StoreOption = None,
    url: UrlOption = None,
    tier: TierOption = None,
    admin_api_key_file: AdminKeyOption = None,
    json_output: JsonOption = False,
) -> None:
    """Read every record against its checksum and remove damaged ones."""
    _cache("verify", store, url, admin_api_key_file, json_output, tier=tier)


@cache_app.command("pin")
def cache_pin(
    keys: KeysArgument,
    ttl: Annotated[
        str | None, typer.Option("--ttl", help="How long: 90s, 30m, 2h, 7d, 1w; default for good.")
    ] = None,
    store: StoreOption = None,
    url: UrlOption = None,
    tier: TierOption = None,
    admin_api_key_file: AdminKeyOption = None,
    json_output: JsonOption = False,
) -> None:
    """Keep chunks: no eviction removes them, and engines pin them in memory at their start."""
    from rag_pipeline.cli.cache_server import parse_ttl

    _cache(
        "pin",
        store,
        url,
        admin_api_key_file,
        json_output,
        tier=tier,
        keys=tuple(keys),
        ttl_s=parse_ttl(ttl),
    )


@cache_app.command("unpin")
def cache_unpin(
    keys: KeysArgument,
    store: StoreOption = None,
    url: UrlOption = None,
    tier: TierOption = None,
    admin_api_key_file: AdminKeyOption = None,
    json_output: JsonOption = False,
) -> None:
    """Make chunks evictable again."""
    _cache("unpin", store, url, admin_api_key_file, json_output, tier=tier, keys=tuple(keys))


@cache_app.command("prefetch")
def cache_prefetch(
    keys: KeysArgument,
    url: UrlOption = None,
    tier: TierOption = None,
    admin_api_key_file: AdminKeyOption = None,
    json_output: JsonOption = False,
) -> None:
    """Bring chunks of a server's lower tiers into its memory."""
    if url is None:
        raise typer.BadParameter("Give --url: a folder has no memory to bring chunks into")
    _cache("prefetch", None, url, admin_api_key_file, json_output, tier=tier, keys=tuple(keys))


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
        typer.Option(min=0, help="Remove the longest unused until the others weigh no more."),
    ] = None,
    store: StoreOption = None,
    url: UrlOption = None,
    tier: TierOption = None,
    admin_api_key_file: AdminKeyOption = None,
    json_output: JsonOption = False,
) -> None:
    """Remove chunks; pinned ones stay and are named."""
    words = (*(keys or ()), *(key or ()))
    if not words and max_bytes is None:
        raise typer.BadParameter("Give keys (KEY... or --key), or --max-bytes")
    _cache(
        "evict",
        store,
        url,
        admin_api_key_file,
        json_output,
        tier=tier,
        keys=words,
        max_bytes=max_bytes,
    )


def _one_place(url: str | None, store: Path | None) -> None:
    if url is not None and store is not None:
        raise typer.BadParameter("--url and --store name two places; give one")


def _cache(
    action: str,
    store: Path | None,
    url: str | None,
    key_file: Path | None,
    json_output: bool,
    **options: Any,
) -> None:
    from rag_pipeline.cli.cache import run_cache, run_on_server

    tier = options.pop("tier", None)
    if url is not None:
        _one_place(url, store)
        run_on_server(
            action, url=url, key_file=key_file, json_output=json_output, tier=tier, **options
        )
        return
    for name, given in (("--tier", tier), ("--admin-api-key-file", key_file)):
        if given is not None:
            raise typer.BadParameter(f"{name} needs --url: a folder is one tier, and has no key")
    run_cache(action, store=store, json_output=json_output, **options)
