"""Chunk-KV cache: keys, records, the in-memory tier, automatic matching, import and export.

Knows torch, knows no serving engine. Names are loaded on first use, so that
``import chunk_cache.keys`` costs no more than NumPy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chunk_cache.background_writer import BackgroundWriter
    from chunk_cache.errors import ChunkCacheError, IntegrityError
    from chunk_cache.folder import LoadReport, StoreFolder
    from chunk_cache.folder_budget import DISK_BYTES
    from chunk_cache.folder_layout import tenant_mark
    from chunk_cache.handles import Build, ChunkState, Lease
    from chunk_cache.keys import (
        STORE_FORMAT_VERSION,
        ChunkKey,
        KVContext,
        as_prompt_ids,
        as_token_ids,
        canonical_json,
        hash_token_ids,
    )
    from chunk_cache.listing import EntryInfo, Resolution
    from chunk_cache.matching import ChunkMatcher, MatchResult
    from chunk_cache.memory_store import MemoryStore
    from chunk_cache.private_files import make_private, sync_folder, write_private
    from chunk_cache.records import ChunkKV, KVLayout, LayerKV
    from chunk_cache.spans import Match, check_spans, merge_matches
    from chunk_cache.stats import StoreStats
    from chunk_cache.text_marks import TextMarks
    from chunk_cache.tier import Tier

_HOME = {
    "DISK_BYTES": "folder_budget",
    "STORE_FORMAT_VERSION": "keys",
    "BackgroundWriter": "background_writer",
    "Build": "handles",
    "ChunkCacheError": "errors",
    "ChunkKV": "records",
    "ChunkKey": "keys",
    "ChunkMatcher": "matching",
    "ChunkState": "handles",
    "EntryInfo": "listing",
    "IntegrityError": "errors",
    "KVContext": "keys",
    "KVLayout": "records",
    "LayerKV": "records",
    "Lease": "handles",
    "LoadReport": "folder",
    "Match": "spans",
    "MatchResult": "matching",
    "MemoryStore": "memory_store",
    "Resolution": "listing",
    "StoreFolder": "folder",
    "StoreStats": "stats",
    "TextMarks": "text_marks",
    "Tier": "tier",
    "as_prompt_ids": "keys",
    "as_token_ids": "keys",
    "canonical_json": "keys",
    "check_spans": "spans",
    "hash_token_ids": "keys",
    "merge_matches": "spans",
    "make_private": "private_files",
    "sync_folder": "private_files",
    "tenant_mark": "folder_layout",
    "write_private": "private_files",
}

__all__ = [
    "DISK_BYTES",
    "STORE_FORMAT_VERSION",
    "BackgroundWriter",
    "Build",
    "ChunkCacheError",
    "ChunkKV",
    "ChunkKey",
    "ChunkMatcher",
    "ChunkState",
    "EntryInfo",
    "IntegrityError",
    "KVContext",
    "KVLayout",
    "LayerKV",
    "Lease",
    "LoadReport",
    "Match",
    "MatchResult",
    "MemoryStore",
    "Resolution",
    "StoreFolder",
    "StoreStats",
    "TextMarks",
    "Tier",
    "as_prompt_ids",
    "as_token_ids",
    "canonical_json",
    "check_spans",
    "hash_token_ids",
    "make_private",
    "merge_matches",
    "sync_folder",
    "tenant_mark",
    "write_private",
]


def __getattr__(name: str) -> Any:
    """Load a public name from its module on first use."""
    if name not in _HOME:
        raise AttributeError(f"module 'chunk_cache' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"chunk_cache.{_HOME[name]}"), name)
    globals()[name] = value
    return value
