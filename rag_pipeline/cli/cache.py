"""``rag-pipeline cache``: the chunk-KV folder, or a running server's cache, from the command line."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rag_pipeline.cli.cache_server import admin_key, operator_key, order_server
from rag_pipeline.cli.console import emit_json, say, step, write
from rag_pipeline.config import kv_store_dir
from rag_pipeline.errors import RagPipelineError

if TYPE_CHECKING:
    from chunk_cache import ChunkKey, StoreFolder
    from retrievers import Index


def use_store(
    given: Path | None, index: Index | None = None, *, tenants: Sequence[str] | None = ()
) -> Path:
    """Make engines started by this process keep chunk KV in a folder, and return it.

    What was `given` wins over ``store_dir`` of ``RAG_PIPELINE_FUSION``, which wins over the
    folder below ``RAG_PIPELINE_HOME``. With an `index`, chunks are computed behind a sample of it,
    unless the settings name another passage. Of `tenants` (their salts, up to a `/`) records are read at
    start, besides those of nobody in particular; ``None`` reads all.
    """
    from chunk_cache import tenant_mark
    from rag_pipeline.prompts.passage_sample import index_passage
    from rag_pipeline.sglang_plugin import FUSION_VARIABLE, FusionConfig

    config = FusionConfig.from_env()
    folder = (given or Path(config.store_dir or kv_store_dir())).absolute()
    if config.enabled:
        passage = config.passage_file
        if passage and not Path(passage).is_file():
            raise RagPipelineError(
                f"fusion.passage_file {passage} is not a file; name one, or none"
            )
        if not passage and index is not None:
            passage = str(index_passage(index) or "")
        marks = "*" if tenants is None else ",".join(map(tenant_mark, tenants))
        chosen = dataclasses.replace(
            config, store_dir=str(folder), passage_file=passage, store_tenants=marks
        )
        os.environ[FUSION_VARIABLE] = chosen.to_env()
    return folder


def run_warm(
    *,
    index: Path,
    model: str,
    store: Path | None,
    limit: int | None,
    url: str | None = None,
) -> dict[str, Any]:
    """Compute the KV of an index's chunks behind the shared prefix and keep it in the folder, or in a server."""
    from rag_pipeline import EngineBackend, PromptBuilder, RagPipeline, ServerBackend
    from rag_pipeline.cli.common import resolve_llm_shown
    from retrievers import Index

    opened = Index.open(index)
    path = resolve_llm_shown(model).path
    total = len(opened) if limit is None else min(limit, len(opened))
    chunks = (chunk for _, chunk in zip(range(total), opened.chunks(), strict=False))
    backend: EngineBackend | ServerBackend
    if url is None:
        folder = use_store(store, opened)
        with step(f"Starting SGLang with {model}"):
            backend = EngineBackend.start(path)
    else:
        backend = ServerBackend(url, api_key=operator_key())
        backend.check_model(path)
    with (
        RagPipeline(opened.retriever("bm25"), backend, PromptBuilder(path)) as pipeline,
        step("Computing chunk KV", total=total) as advance,
    ):
        done = pipeline.warm(chunks, progress=lambda count: advance(done=count, total=total))
    return {"warmed": done, **({"url": url} if url else folder_stats(_open(folder)))}


def print_warm(report: dict[str, Any], *, json_output: bool) -> None:
    """Print what a warm-up did."""
    if json_output:
        emit_json(report)
    elif "url" in report:
        say(f"{report['warmed']} chunks sent to {report['url']}")
    else:
        say(
            f"{report['warmed']} chunks sent; {report['store']} holds {report['chunks']} chunks, "
            f"{report['bytes'] / 2**20:.0f} MiB"
        )


def run_cache(
    action: str,
    *,
    store: Path | None,
    keys: tuple[str, ...] = (),
    max_bytes: int | None = None,
    ttl_s: float | None = None,
    json_output: bool,
) -> None:
    """Run ``stats``, ``ls``, ``verify``, ``pin``, ``unpin`` or ``evict`` on the folder."""
    folder = _open(store or kv_store_dir())
    done: dict[str, Any] = {}
    if action == "ls":
        done["entries"] = [_entry(folder, key) for key in folder.keys()]  # noqa: SIM118 - not a mapping
    elif action == "verify":
        with step("Reading every file"):
            bad = folder.verify(remove=True)
        done["damaged_removed"] = [key.digest for key in bad]
    elif action in ("pin", "unpin"):
        is_pin = action == "pin"
        done[f"{action}ned"] = [
            key.digest
            for key in _find(folder, keys)
            if (folder.pin(key, ttl_s=ttl_s) if is_pin else folder.unpin(key))
        ]
        if is_pin:
            done["ttl_s"] = ttl_s
    elif action == "evict":
        done = _evict(folder, keys, max_bytes)
    _show({**folder_stats(folder), **done}, json_output=json_output)


def run_on_server(
    action: str, *, url: str, key_file: Path | None, json_output: bool, **fields: Any
) -> None:
    """Have a running server carry out an action on its tiers, and print what it says."""
    report = order_server(url, admin_key(key_file), action, fields)
    report.pop("object", None)
    _show(report, json_output=json_output)


def _show(report: dict[str, Any], *, json_output: bool) -> None:
    """Print a report as JSON, or as lines: entries and tiers first, then one figure each, and what each replica did."""
    if json_output:
        emit_json(report)
        return
    for entry in report.pop("entries", ()):
        write(f"{_line(entry)}\n")
    for tier in report.pop("tiers", ()):
        name = tier.pop("name")
        write(f"{name:16} {'  '.join(f'{k} {_figure(v)}' for k, v in tier.items())}\n")
    replicas = report.pop("replicas", ())
    for name, value in report.items():
        write(f"{name:16} {_figure(value)}\n")
    for number, replica in enumerate(replicas):
        write(f"{f'replica {number}':16} {_figure(replica)}\n")


def _line(entry: Mapping[str, Any]) -> str:
    size = entry["bytes"]
    where = ""
    if isinstance(size, dict):
        where = f"  {'+'.join(size)}"
        size = max(size.values(), default=0)
    pin = "  pinned" if entry["pinned"] else ""
    left = entry["pin_ttl_s"]
    ends = "" if left is None else f" for {left:.0f} s"
    rough = "  approximate in memory" if entry.get("approximate") else ""
    return f"{entry['key'][:16]}  {entry['num_tokens']:6} tokens  {size:12} bytes{where}{pin}{ends}{rough}"


def _figure(value: object) -> str:
    if isinstance(value, list):
        return " ".join(_figure(o) if isinstance(o, dict) else str(o)[:16] for o in value) or "none"
    if isinstance(value, dict):
        return "; ".join(f"{name} {_figure(one)}" for name, one in value.items()) or "none"
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else str(value)


def folder_stats(folder: StoreFolder) -> dict[str, Any]:
    """Chunks, tokens, bytes, pins and namespaces of a folder, and files that are not finished."""
    keys = list(folder.keys())
    unfinished, unfinished_bytes = folder.unfinished()
    pins = folder.pins()
    return {
        "store": str(folder.path),
        "chunks": len(keys),
        "tokens": sum(key.num_tokens for key in keys),
        "bytes": sum(folder.size_of(key) for key in keys),
        "pinned_chunks": len(pins),
        "pinned_bytes": sum(folder.size_of(key) for key in pins),
        "namespaces": len({key.namespace for key in keys}),
        "unfinished_files": unfinished,
        "unfinished_bytes": unfinished_bytes,
    }


def _open(path: Path) -> StoreFolder:
    from chunk_cache import ChunkCacheError, StoreFolder

    try:
        return StoreFolder(path)
    except ChunkCacheError as error:
        raise RagPipelineError(f"{error} (`rag-pipeline cache warm` makes one)") from None


def _entry(folder: StoreFolder, key: ChunkKey) -> dict[str, Any]:
    until = folder.pinned_until(key)
    return {
        "key": key.digest,
        "namespace": key.namespace,
        "num_tokens": key.num_tokens,
        "bytes": folder.size_of(key),
        "pinned": until > 0,
        "pin_ttl_s": None if until in (0.0, math.inf) else round(until - time.time(), 3),
    }


def _evict(
    folder: StoreFolder, prefixes: tuple[str, ...], max_bytes: int | None
) -> dict[str, list[str]]:
    """Remove the named chunks, then the oldest until the rest fits; pinned ones stay, and are named."""
    wanted = _find(folder, prefixes) if prefixes else []
    kept = [key for key in wanted if folder.is_pinned(key)]
    if kept and len(kept) == len(wanted) and max_bytes is None:
        raise RagPipelineError(
            f"pinned, not evicted: {', '.join(key.digest[:16] for key in kept)}; "
            "`cache unpin` them first"
        )
    gone = [key for key in wanted if folder.evict(key)]
    if max_bytes is not None:
        gone += folder.trim(max_bytes)
        if folder_stats(folder)["bytes"] > max_bytes:
            # Only pins can be in the way.
            kept = [key for key in folder.keys() if folder.is_pinned(key)]  # noqa: SIM118
    return {
        "evicted": [key.digest for key in gone],
        "pinned_kept": [key.digest for key in kept],
    }


def _find(folder: StoreFolder, prefixes: tuple[str, ...]) -> list[ChunkKey]:
    """Keys that begin with any of the words; each word must be the beginning of one."""
    from chunk_cache import keys_named

    found, unknown = keys_named(folder.keys(), prefixes)
    if unknown:
        named = ", ".join(map(repr, unknown))
        raise RagPipelineError(f"no chunk's key begins with {named}; `cache ls` lists the keys")
    return found
