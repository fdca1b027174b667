"""Chunk KV that outlives the engine: read from a folder at start, written there when it is made.

The folder is a cache of a cache: whatever goes wrong with it is logged once, counted, and serving goes on.
Reading fills the memory store up to its budget and evicts nothing. Only records whose namespace (weights,
dtype, rotation, prefix, tenant, shard) a request asks for are ever found, so one folder may hold several models.
"""

from __future__ import annotations

import logging

from chunk_cache import ChunkCacheError, ChunkKV, StoreFolder
from rag_pipeline.sglang_plugin.fusion.runtime import FusionRuntime

logger = logging.getLogger(__name__)


def open_folder(runtime: FusionRuntime) -> None:
    """Open the configured folder and read what fits; does nothing without one."""
    path = runtime.config.store_dir
    if not path or not runtime.is_on:
        return
    try:
        folder = StoreFolder(path, create=True)
        report = folder.load_into(runtime.store)
    except (ChunkCacheError, OSError) as error:
        logger.error("Chunk-KV folder %s is not used: %s", path, error)
        runtime.metrics.count("disk", "unusable")
        return
    runtime.folder = folder
    for name, number in report.to_json().items():
        runtime.metrics.count("disk", name, number)
    logger.info("Chunk-KV folder %s: %s", path, report.to_json())


def keep(runtime: FusionRuntime, record: ChunkKV) -> None:
    """Write a record that was just stored; a disk that refuses costs a warning, not the request."""
    if runtime.folder is None:
        return
    try:
        runtime.folder.put(record)
        runtime.metrics.count("disk", "written")
    except OSError as error:
        runtime.metrics.count("disk", "write_failed")
        runtime.say_once("disk", "Chunk KV is not written to disk: %s", error)
