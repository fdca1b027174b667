"""``rag-pipeline cache``: the chunk-KV folder from the command line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rag_pipeline.cli.console import emit_json, say, step, write
from rag_pipeline.config import kv_store_dir
from rag_pipeline.errors import RagPipelineError

if TYPE_CHECKING:
    from chunk_cache import ChunkKey, StoreFolder


def use_store(folder: Path) -> None:
    """Make engines started by this process read and write chunk KV in `folder`."""
    from rag_pipeline.sglang_plugin import FUSION_VARIABLE, FusionConfig

    config = FusionConfig.from_env()
    if config.enabled and not config.store_dir:
        import dataclasses

        chosen = dataclasses.replace(config, store_dir=str(folder.absolute()))
        os.environ[FUSION_VARIABLE] = chosen.to_env()


def run_warm(*, index: Path, model: str, store: Path | None, limit: int | None) -> dict[str, Any]:
    """Compute the KV of an index's chunks behind the shared prefix and keep it in the folder."""
    from rag_pipeline import EngineBackend, PromptBuilder, RagPipeline
    from rag_pipeline.cli.common import resolve_llm_shown
    from retrievers import Index

    opened = Index.open(index)
    folder = store or kv_store_dir()
    use_store(folder)
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


def run_cache(action: str, *, store: Path | None, keys: tuple[str, ...], json_output: bool) -> None:
    """Run ``stats``, ``ls``, ``verify`` or ``evict`` on the folder."""
    folder = _open(store or kv_store_dir())
    report = folder_stats(folder)
    if action == "ls":
        report["entries"] = [_entry(folder, key) for key in folder.keys()]  # noqa: SIM118 - not a mapping
    elif action == "verify":
        with step("Reading every file"):
            bad = folder.verify(remove=True)
        report = {**folder_stats(folder), "damaged_removed": [key.digest for key in bad]}
    elif action == "evict":
        report = _evict(folder, keys)
    if json_output:
        emit_json(report)
        return
    for entry in report.get("entries", ()):
        write(f"{entry['key'][:16]}  {entry['num_tokens']:6} tokens  {entry['bytes']:12} bytes\n")
    for name, value in report.items():
        if name != "entries":
            write(f"{name:16} {value}\n")


def folder_stats(folder: StoreFolder) -> dict[str, Any]:
    """Chunks, tokens, bytes and namespaces of a folder."""
    keys = list(folder.keys())
    return {
        "store": str(folder.path),
        "chunks": len(keys),
        "tokens": sum(key.num_tokens for key in keys),
        "bytes": sum(folder.size_of(key) for key in keys),
        "namespaces": len({key.namespace for key in keys}),
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
    }


def _evict(folder: StoreFolder, prefixes: tuple[str, ...]) -> dict[str, Any]:
    if not prefixes:
        raise RagPipelineError("cache evict needs --key, the first digits of keys from `cache ls`")
    wanted = [key for key in list(folder.keys()) if key.digest.startswith(prefixes)]
    unknown = [p for p in prefixes if not any(key.digest.startswith(p) for key in wanted)]
    if unknown:
        raise RagPipelineError(f"no chunk's key begins with {', '.join(unknown)}; see `cache ls`")
    for key in wanted:
        folder.remove(key)
    return {**folder_stats(folder), "evicted": [key.digest for key in wanted]}
