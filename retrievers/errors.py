"""User-fixable errors of retrieval, one line each: what was given, what is allowed."""

from __future__ import annotations


class RetrievalError(ValueError):
    """A fault in what the user gave (a path, a setting, an index on disk), never in our code."""


class CorruptIndexError(RetrievalError):
    """An index folder whose files do not match its manifest."""


class IndexBusyError(RetrievalError):
    """An index that another process is changing; it can be tried again."""


class StorageError(RetrievalError):
    """A disk that refuses to write, sync, rename or remove: full, read-only or broken.

    Attributes
    ----------
    errno : int or None
        The system's number of the reason; None where it gave none.
    """

    def __init__(self, message: str, errno: int | None = None) -> None:
        super().__init__(message)
        self.errno = errno


class EmbedderMismatchError(RetrievalError):
    """An index opened with another embedder than the one it was built with."""
