"""Eviction policies: which stored KV goes first, in an engine and in the simulator.

Pure Python; knows no tensors and no engine. Start with :func:`create_eviction`.
"""

from __future__ import annotations

from chunk_cache.eviction.base import EvictionPolicy, StoredItem, WaitingJob
from chunk_cache.eviction.belady import BeladyPolicy
from chunk_cache.eviction.lookahead import DEFAULT_TTL_S, LookAheadPolicy
from chunk_cache.eviction.registry import DEFAULT_EVICTION, EVICTIONS, create_eviction

__all__ = [
    "DEFAULT_EVICTION",
    "DEFAULT_TTL_S",
    "EVICTIONS",
    "BeladyPolicy",
    "EvictionPolicy",
    "LookAheadPolicy",
    "StoredItem",
    "WaitingJob",
    "create_eviction",
]
