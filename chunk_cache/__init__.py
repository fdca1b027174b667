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
        TokenIds,
        as_prompt_ids,
        as_token_ids,
        canonical_json,
        hash_token_ids,
        keys_named,
    )
    from chunk_cache.layouts.base import KV_LAYOUTS, KVLayout, LayerKV, layout_named, layout_of_pool
    from chunk_cache.matching import ChunkMatcher, MatchResult
    from chunk_cache.records import ChunkKV
    from chunk_cache.side_tensors import SEEN_IDS
    from chunk_cache.spans import Match, check_spans, merge_matches
    from chunk_cache.store.builds import Build, ChunkState
    from chunk_cache.store.lease import Lease
    from chunk_cache.store.listing import EntryInfo, Resolution
    from chunk_cache.store.loading import LoadingChunk, Patience, RecordForm
    from chunk_cache.store.memory import MemoryStore
    from chunk_cache.store.stats import StoreStats
    from chunk_cache.text_marks import TextMarks
    from chunk_cache.tiers.background_writer import BackgroundWriter
    from chunk_cache.tiers.base import TIERS, LayerReader, Member, Tier
    from chunk_cache.tiers.disk.budget import DISK_BYTES
    from chunk_cache.tiers.disk.folder import StoreFolder
    from chunk_cache.tiers.disk.layout import chunk_path, holds_store, tenant_mark
    from chunk_cache.tiers.disk.private_files import make_private, sync_folder, write_private
    from chunk_cache.tiers.encoding import Buffer, RecordHeader, encode_record, read_header
    from chunk_cache.tiers.fetch import Candidate, Fetch
    from chunk_cache.tiers.fetcher import PATIENCE_S, Fetcher
    from chunk_cache.tiers.guard import GuardedTier
    from chunk_cache.tiers.guarded_calls import TierDownError
    from chunk_cache.tiers.pause import Pauses
    from chunk_cache.tiers.prefetch import FetchLayers
    from chunk_cache.tiers.remote.connect import check_remote, connect_board, connect_remote
    from chunk_cache.tiers.remote.described import describe_context, read_description
    from chunk_cache.tiers.remote.header_first import FoundRecord, HeaderFirstTier
    from chunk_cache.tiers.remote.notices import KEEP_S, NoticeBoard, Posted
    from chunk_cache.tiers.remote.url import RemoteURL, parse_remote_url, shown_url
    from chunk_cache.tiers.tiered import TierChain
    from chunk_cache.tiers.timeline import Interval, Timeline, layer_wise_seconds
    from chunk_cache.tiers.transfer import StoreLoadReport, export_store, load_store, pin_as_in

_HOME = {
    "BackgroundWriter": "tiers.background_writer",
    "Buffer": "tiers.encoding",
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
    "DamagedRecordError": "errors",
    "EntryInfo": "store.listing",
    "Fetch": "tiers.fetch",
    "FetchLayers": "tiers.prefetch",
    "Fetcher": "tiers.fetcher",
    "FoundRecord": "tiers.remote.header_first",
    "GoneRecordError": "errors",
    "GuardedTier": "tiers.guard",
    "HeaderFirstTier": "tiers.remote.header_first",
    "IntegrityError": "errors",
    "Interval": "tiers.timeline",
    "KEEP_S": "tiers.remote.notices",
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
    "Member": "tiers.base",
    "MemoryStore": "store.memory",
    "NoticeBoard": "tiers.remote.notices",
    "PATIENCE_S": "tiers.fetcher",
    "Patience": "store.loading",
    "Pauses": "tiers.pause",
    "Posted": "tiers.remote.notices",
    "RecordForm": "store.loading",
    "RecordHeader": "tiers.encoding",
    "RemoteURL": "tiers.remote.url",
    "Resolution": "store.listing",
    "SEEN_IDS": "side_tensors",
    "STORE_FORMAT_VERSION": "keys",
    "StoreFolder": "tiers.disk.folder",
    "StoreLoadReport": "tiers.transfer",
    "StoreStats": "store.stats",
    "TIERS": "tiers.base",
    "TextMarks": "text_marks",
    "Tier": "tiers.base",
    "TierChain": "tiers.tiered",
    "TierDownError": "tiers.guarded_calls",
    "Timeline": "tiers.timeline",
    "TokenIds": "keys",
    "as_prompt_ids": "keys",
    "as_token_ids": "keys",
    "canonical_json": "keys",
    "check_remote": "tiers.remote.connect",
    "check_spans": "spans",
    "chunk_path": "tiers.disk.layout",
    "codec_named": "codecs.base",
    "connect_board": "tiers.remote.connect",
    "connect_remote": "tiers.remote.connect",
    "describe_context": "tiers.remote.described",
    "encode_layers": "codecs.base",
    "encode_record": "tiers.encoding",
    "export_store": "tiers.transfer",
    "hash_token_ids": "keys",
    "holds_store": "tiers.disk.layout",
    "keys_named": "keys",
    "layer_wise_seconds": "tiers.timeline",
    "layout_named": "layouts.base",
    "layout_of_pool": "layouts.base",
    "load_store": "tiers.transfer",
    "make_private": "tiers.disk.private_files",
    "merge_matches": "spans",
    "parse_remote_url": "tiers.remote.url",
    "pin_as_in": "tiers.transfer",
    "read_description": "tiers.remote.described",
    "read_header": "tiers.encoding",
    "shown_url": "tiers.remote.url",
    "sync_folder": "tiers.disk.private_files",
    "tenant_mark": "tiers.disk.layout",
    "write_private": "tiers.disk.private_files",
}

__all__ = [
    "CODECS",
    "DISK_BYTES",
    "KEEP_S",
    "KV_LAYOUTS",
    "LOSSLESS",
    "PATIENCE_S",
    "SEEN_IDS",
    "STORE_FORMAT_VERSION",
    "TIERS",
    "BackgroundWriter",
    "Buffer",
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
    "FetchLayers",
    "Fetcher",
    "FoundRecord",
    "GoneRecordError",
    "GuardedTier",
    "HeaderFirstTier",
    "IntegrityError",
    "Interval",
    "KVContext",
    "KVLayout",
    "LayerKV",
    "LayerReader",
    "Lease",
    "LoadError",
    "LoadingChunk",
    "Match",
    "MatchResult",
    "Member",
    "MemoryStore",
    "NoticeBoard",
    "Patience",
    "Pauses",
    "Posted",
    "RecordForm",
    "RecordHeader",
    "RemoteURL",
    "Resolution",
    "StoreFolder",
    "StoreLoadReport",
    "StoreStats",
    "TextMarks",
    "Tier",
    "TierChain",
    "TierDownError",
    "Timeline",
    "TokenIds",
    "as_prompt_ids",
    "as_token_ids",
    "canonical_json",
    "check_remote",
    "check_spans",
    "chunk_path",
    "codec_named",
    "connect_board",
    "connect_remote",
    "describe_context",
    "encode_layers",
    "encode_record",
    "export_store",
    "hash_token_ids",
    "holds_store",
    "keys_named",
    "layer_wise_seconds",
    "layout_named",
    "layout_of_pool",
    "load_store",
    "make_private",
    "merge_matches",
    "parse_remote_url",
    "pin_as_in",
    "read_description",
    "read_header",
    "shown_url",
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
