"""Plain text files."""

from __future__ import annotations

from collections.abc import Iterator

from retrievers.loaders.base import LoadReport, Source, register_loader, whole_file_document
from retrievers.loaders.encoding import decode
from retrievers.types import Document


@register_loader(".txt", ".text", ".rst", ".log")
def load_text(source: Source, report: LoadReport) -> Iterator[Document]:
    """Yield the file as one document, titled by its stem."""
    text = decode(source.file.read_bytes(), source.path, report=report)
    yield whole_file_document(source, text, kind="txt")
