"""User-fixable errors. The command line prints them as one line and exits with 1."""

from __future__ import annotations


class RagPipelineError(ValueError):
    """A fault in what the user gave; the message says what was given, what is allowed, and what to change."""


class ModelError(RagPipelineError):
    """A model or embedder name that cannot be turned into a folder of weights."""


class EngineError(RagPipelineError):
    """The engine cannot be started or reached as asked."""


def one_line(words: object, limit: int | None = None) -> str:
    """Text of an error or of anything else as one line, cut after `limit` characters."""
    return " ".join(str(words).split())[:limit]
