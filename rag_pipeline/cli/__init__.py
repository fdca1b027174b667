"""The `rag-pipeline` command. :func:`main` is its only door."""

from __future__ import annotations

from rag_pipeline.cli.entry import main

__all__ = ["main"]
