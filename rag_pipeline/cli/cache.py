"""``rag-pipeline cache``: the chunk-KV folder from the command line."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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


def run_warm(*, index: Path, model: str, store: Path | None, limit: int | None) -> dict[str, Any]:
    """Compute the KV of an index's chunks behind the shared prefix and keep it in the folder."""
    from rag_pipeline import EngineBackend, PromptBuilder, RagPipeline
    from rag_pipeline.cli.common import resolve_llm_shown
    from retrievers import Index

    opened = Index.open(index)
    folder = use_store(store, opened)
    path = resolve_llm_shown(model).path
    total = len(opened) if limit is None else min(limit, len(opened))
    chunks = (chunk for _, chunk in zip(range(total), opened.chunks(), strict=False))
    with step(f"Starting SGLang with {model}"):
        backend = EngineBackend.start(path)
    with (
        RagPipeline(opened.retriever("bm25"), backend, PromptBuilder(path)) as pipeline,
        step("Computing chunk KV", total=total) as advance,
    ):
        done = pipeline.warm(chunks, progress=lambda count: advance(done=count, total=total))
    return {"warmed": done, **folder_stats(_open(folder))}


def print_warm(report: dict[str, Any], *, json_output: bool) -> None:
    """Print what a warm-up did."""
    if json_output:
        emit_json(report)
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
        change = folder.pin if action == "pin" else folder.unpin
        done[f"{action}ned"] = [key.digest for key in _find(folder, keys) if change(key)]
    elif action == "evict":
        done = _evict(folder, keys, max_bytes)
    report = {**folder_stats(folder), **done}
    if json_output:
        emit_json(report)
        return
    for entry in report.pop("entries", ()):
        write(
            f"{entry['key'][:16]}  {entry['num_tokens']:6} tokens  {entry['bytes']:12} bytes"
            f"{'  pinned' if entry['pinned'] else ''}\n"
        )
    for name, value in report.items():
        shown = " ".join(digest[:16] for digest in value) or "none" if name in done else value
        write(f"{name:16} {shown}\n")


def folder_stats(folder: StoreFolder) -> dict[str, Any]:
    """Chunks, tokens, bytes, pins and namespaces of a folder, and files that are not finished."""
    keys = list(folder.keys())
    unfinished, unfinished_bytes = folder.unfinished()
    pins = [key for key in keys if folder.is_pinned(key)]
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
    return {
        "key": key.digest,
        "namespace": key.namespace,
        "num_tokens": key.num_tokens,
        "bytes": folder.size_of(key),
        "pinned": folder.is_pinned(key),
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
            "`cache pin --unpin` them first"
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
    keys = list(folder.keys())
    unknown = [p for p in prefixes if not p or not any(key.digest.startswith(p) for key in keys)]
    if unknown:
        named = ", ".join(map(repr, unknown))
        raise RagPipelineError(f"no chunk's key begins with {named}; `cache ls` lists the keys")
    return [key for key in keys if key.digest.startswith(prefixes)]
