"""Finding stored chunks in a plain prompt: rolling hash, winnowing, verified runs, longest cover."""

from __future__ import annotations

from chunk_cache.matching.cover import longest_cover
from chunk_cache.matching.hashing import WindowHasher
from chunk_cache.matching.matcher import ChunkMatcher, MatchResult

__all__ = ["ChunkMatcher", "MatchResult", "WindowHasher", "longest_cover"]
