"""Plain text files, and the decoding that every text format starts with."""

from __future__ import annotations

import codecs
from collections.abc import Iterator

from retrievers.errors import RetrievalError
from retrievers.loaders.base import LoadReport, Source, register_loader, whole_file_document
from retrievers.types import Document

# Longest first: the mark of UTF-32-LE begins with that of UTF-16-LE.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_SNIFF_BYTES = 65536
_TEXT_CONTROLS = {7, 8, 9, 10, 12, 13, 27}
_MAX_CONTROL_SHARE = 0.02


def decode(payload: bytes, name: str) -> str:
    """Decode the bytes of a text file.

    By byte-order mark, else strict UTF-8, else what charset-normalizer finds in the first 64 KiB.

    Raises
    ------
    RetrievalError
        When the bytes are binary or in no encoding that fits.
    """
    for mark, encoding in _MARKS:
        if payload.startswith(mark):
            return _strict(payload, encoding, name)
    head = payload[:_SNIFF_BYTES]
    controls = sum(byte < 32 and byte not in _TEXT_CONTROLS for byte in head)
    if b"\0" in head or controls > _MAX_CONTROL_SHARE * len(head):
        raise RetrievalError(f"{name}: binary file; only text and the known formats can be read")
    try:
        return payload.decode("utf-8")
    except UnicodeDecodeError:
        return _strict(payload, _guess(head, name), name)


def _strict(payload: bytes, encoding: str, name: str) -> str:
    try:
        return payload.decode(encoding)
    except (UnicodeDecodeError, LookupError) as error:
        raise RetrievalError(f"{name}: not valid {encoding}; save it as UTF-8") from error


def _guess(head: bytes, name: str) -> str:
    try:
        from charset_normalizer import from_bytes
    except ImportError:
        return "cp1252"
    match = from_bytes(head).best()
    if match is None:
        raise RetrievalError(f"{name}: text encoding not recognised; save it as UTF-8")
    return match.encoding


@register_loader(".txt", ".text", ".rst", ".log")
def load_text(source: Source, report: LoadReport) -> Iterator[Document]:
    """Yield the file as one document, titled by its stem."""
    text = decode(source.file.read_bytes(), source.path)
    yield whole_file_document(source, text, kind="txt")
