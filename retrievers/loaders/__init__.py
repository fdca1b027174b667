"""Loaders: files, folders and data sets to a stream of documents, one module per format.

A format's parser is imported when the first file of that format is met.
"""

from __future__ import annotations

# Imported for their registration.
from retrievers.loaders import datasets, html, markdown, pdf, text
from retrievers.loaders.base import (
    Loader,
    LoadReport,
    SkippedSource,
    Source,
    known_suffixes,
    register_loader,
    whole_file_document,
)
from retrievers.loaders.corpus import load_corpus, load_file
from retrievers.loaders.topics import TOPICS_NAME, load_topics

__all__ = [
    "TOPICS_NAME",
    "LoadReport",
    "Loader",
    "SkippedSource",
    "Source",
    "datasets",
    "html",
    "known_suffixes",
    "load_corpus",
    "load_file",
    "load_topics",
    "markdown",
    "pdf",
    "register_loader",
    "text",
    "whole_file_document",
]
