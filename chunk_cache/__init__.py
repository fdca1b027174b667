"""Chunk-KV cache: keys, records, the in-memory tier, automatic matching, import and export.

Knows torch, knows no serving engine. Names are loaded on first use, so that
``import chunk_cache.keys`` costs no more than NumPy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chunk_cache.codecs.base import (
        CODECS,
        LOSSLESS,
        Codec,
        CodecError,
        codec_named,
        encode_layers,
    )
    from chunk_cache.errors import (
        ChunkCacheError,
        DamagedRecordError,
        GoneRecordError,
        IntegrityError,
        LoadError,
    )
    from chunk_cache.keys import (
        STORE_FORMAT_VERSION,
        ChunkKey,
        KVContext,
        as_prompt_ids,
        as_token_ids,
        canonical_json,
        hash_token_ids,
    )
    from chunk_cache.layouts.base import KV_LAYOUTS, KVLayout, LayerKV, layout_named, layout_of_pool
    from chunk_cache.matching import ChunkMatcher, MatchResult
    from chunk_cache.records import ChunkKV
    from chunk_cache.spans import Match, check_spans, merge_matches
    from chunk_cache.store.builds import Build, ChunkState
    from chunk_cache.store.lease import Lease
    from chunk_cache.store.listing import EntryInfo, Resolution
    from chunk_cache.store.loading import LoadingChunk, Patience, RecordForm
    from chunk_cache.store.memory import MemoryStore
    from chunk_cache.store.stats import StoreStats
    from chunk_cache.text_marks import TextMarks
    from chunk_cache.tiers.background_writer import BackgroundWriter
    from chunk_cache.tiers.base import TIERS, LayerReader, Tier
    from chunk_cache.tiers.disk.budget import DISK_BYTES
    from chunk_cache.tiers.disk.folder import StoreFolder
    from chunk_cache.tiers.disk.layout import tenant_mark
    from chunk_cache.tiers.disk.private_files import make_private, sync_folder, write_private
    from chunk_cache.tiers.fetch import Candidate, Fetch
    from chunk_cache.tiers.fetcher import Fetcher
    from chunk_cache.tiers.tiered import TierChain
    from chunk_cache.tiers.timeline import Timeline, layer_wise_seconds
    from chunk_cache.tiers.transfer import StoreLoadReport, export_store, load_store

_HOME = {
    "BackgroundWriter": "tiers.background_writer",
    "Build": "store.builds",
    "CODECS": "codecs.base",
    "Candidate": "tiers.fetch",
    "ChunkCacheError": "errors",
    "ChunkKV": "records",
    "ChunkKey": "keys",
    "ChunkMatcher": "matching",
    "ChunkState": "store.builds",
    "Codec": "codecs.base",
    "CodecError": "codecs.base",
    "DISK_BYTES": "tiers.disk.budget",
    "EntryInfo": "store.listing",
    "DamagedRecordError": "errors",
    "GoneRecordError": "errors",
    "Fetch": "tiers.fetch",
    "Fetcher": "tiers.fetcher",
    "IntegrityError": "errors",
    "KVContext": "keys",
    "KVLayout": "layouts.base",
    "KV_LAYOUTS": "layouts.base",
    "LOSSLESS": "codecs.base",
    "LayerKV": "layouts.base",
    "LayerReader": "tiers.base",
    "Lease": "store.lease",
    "LoadError": "errors",
    "LoadingChunk": "store.loading",
    "Match": "spans",
    "MatchResult": "matching",
    "MemoryStore": "store.memory",
    "Patience": "store.loading",
    "RecordForm": "store.loading",
    "Resolution": "store.listing",
    "STORE_FORMAT_VERSION": "keys",
    "StoreFolder": "tiers.disk.folder",
    "StoreLoadReport": "tiers.transfer",
    "StoreStats": "store.stats",
    "TIERS": "tiers.base",
    "TextMarks": "text_marks",
    "Tier": "tiers.base",
    "TierChain": "tiers.tiered",
    "Timeline": "tiers.timeline",
    "as_prompt_ids": "keys",
    "as_token_ids": "keys",
    "canonical_json": "keys",
    "check_spans": "spans",
    "codec_named": "codecs.base",
    "encode_layers": "codecs.base",
    "export_store": "tiers.transfer",
    "hash_token_ids": "keys",
    "layer_wise_seconds": "tiers.timeline",
    "layout_named": "layouts.base",
    "layout_of_pool": "layouts.base",
    "load_store": "tiers.transfer",
    "make_private": "tiers.disk.private_files",
    "merge_matches": "spans",
    "sync_folder": "tiers.disk.private_files",
    "tenant_mark": "tiers.disk.layout",
    "write_private": "tiers.disk.private_files",
}

__all__ = [
    "CODECS",
    "DISK_BYTES",
    "KV_LAYOUTS",
    "LOSSLESS",
    "STORE_FORMAT_VERSION",
    "TIERS",
    "BackgroundWriter",
    "Build",
    "Candidate",
    "ChunkCacheError",
    "ChunkKV",
    "ChunkKey",
    "ChunkMatcher",
    "ChunkState",
    "Codec",
    "CodecError",
    "DamagedRecordError",
    "EntryInfo",
    "Fetch",
    "Fetcher",
    "GoneRecordError",
    "IntegrityError",
    "KVContext",
    "KVLayout",
    "LayerKV",
    "LayerReader",
    "Lease",
    "LoadError",
    "LoadingChunk",
    "Match",
    "MatchResult",
    "MemoryStore",
    "Patience",
    "RecordForm",
    "Resolution",
    "StoreFolder",
    "StoreLoadReport",
    "StoreStats",
    "TextMarks",
    "Tier",
    "TierChain",
    "Timeline",
    "as_prompt_ids",
    "as_token_ids",
    "canonical_json",
    "check_spans",
    "codec_named",
    "encode_layers",
    "export_store",
    "hash_token_ids",
    "layer_wise_seconds",
    "layout_named",
    "layout_of_pool",
    "load_store",
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
