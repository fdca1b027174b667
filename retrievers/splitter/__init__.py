"""Splitting documents into chunks measured in the language model's tokens."""

from __future__ import annotations

from retrievers.splitter.splitter import MIN_CHUNK_TOKENS, TokenSplitter

__all__ = ["MIN_CHUNK_TOKENS", "TokenSplitter"]
