"""Errors of the chunk cache, each one line: what was given, what is allowed, what to change."""

from __future__ import annotations


class ChunkCacheError(ValueError):
    """A fault in what a caller gave (ids, shapes, spans, settings). The store itself is unharmed."""


class IntegrityError(RuntimeError):
    """The store contradicts itself: a fault in this package, never in the caller's data."""


class LoadError(ChunkCacheError):
    """A layer of a record that is read from a lower tier does not come; the prompt is prefilled as usual."""


class DamagedRecordError(ChunkCacheError):
    """Stored bytes are not what was written; the record is a miss, and whoever finds out removes it."""


class GoneRecordError(ChunkCacheError):
    """A record was evicted or removed by somebody else while it was read: a plain miss, of which nothing is wrong."""
