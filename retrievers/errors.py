"""Errors of retrieval that a user can mend, each one line: what was given, what is allowed."""

from __future__ import annotations


class RetrievalError(ValueError):
    """A fault in what the user gave (a path, a setting, an index on disk), never in our code."""


class CorruptIndexError(RetrievalError):
    """An index folder whose files do not match its manifest."""


class EmbedderMismatchError(RetrievalError):
    """An index opened with another embedder than the one it was built with."""
