"""PDF files, read by pypdf; the text layer only, no character recognition."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from retrievers.errors import RetrievalError
from retrievers.loaders.base import LoadReport, Source, register_loader, whole_file_document
from retrievers.loaders.pdf_fields import page_annotations
from retrievers.types import Document

if TYPE_CHECKING:
    from pypdf import PageObject, PdfReader

# One sign on paper, two letters to a reader.
_LIGATURES = {
    0xFB00: "ff", 0xFB01: "fi", 0xFB02: "fl", 0xFB03: "ffi", 0xFB04: "ffl", 0xFB05: "st",
    0xFB06: "st",
}  # fmt: skip
_INFLATE_BYTES = 1 << 20


@register_loader(".pdf")
def load_pdf(source: Source, report: LoadReport) -> Iterator[Document]:
    """Yield the file as one document, pages parted by a blank line, titled by its metadata.

    Below the text of a page stand its filled-in form fields and its comments. A page that cannot
    be read is counted in `report`; the others remain.

    Raises
    ------
    RetrievalError
        When the file is encrypted, broken, or has no text layer.
    """
    with _warnings() as warnings:
        reader = _open(source)
        try:
            num_pages = len(reader.pages)
        except Exception as error:
            raise _broken(source, error) from error
        texts, lost = [], []
        for number in range(1, num_pages + 1):
            warnings.clear()
            try:
                page = reader.pages[number - 1]
            except Exception as error:
                lost.append(f"page {number}: cannot be read ({_reason(error)})")
                continue
            text, reasons = _page_text(page)
            texts.append(text)
            # pypdf only logs what it leaves out.
            if reasons or (warnings and not text):
                lost.append(
                    f"page {number}: not all of it read ({_line((reasons or warnings)[0])})"
                )
            elif not text and _has_picture(page):
                report.note(source.path, f"page {number}: a picture without text; run OCR on it")
        title = _title(reader)
    text = "\n\n".join(text for text in texts if text)
    if not text:
        if lost:
            raise RetrievalError(f"{source.path}: broken PDF ({lost[0]}); save it again")
        raise RetrievalError(f"{source.path}: PDF without a text layer; run OCR on it first")
    for reason in lost:
        report.skip(source.path, reason)
    yield whole_file_document(source, text, kind="pdf", title=title, pages=num_pages)


def _open(source: Source) -> PdfReader:
    from pypdf import PdfReader
    from pypdf.errors import DependencyError

    try:
        reader = PdfReader(source.file)
        # Many files are encrypted against editing only and open with the empty password.
        if reader.is_encrypted and not reader.decrypt(""):
            raise RetrievalError(f"{source.path}: encrypted PDF; save it without a password")
    except (RetrievalError, OSError):
        raise
    except DependencyError as error:
        raise RetrievalError(f"{source.path}: encrypted PDF; save it without a password") from error
    # A damaged file makes pypdf fail in many ways besides its own error class (KeyError,
    # RecursionError, struct and zlib errors); all of them mean the same to the user.
    except Exception as error:
        raise _broken(source, error) from error
    return reader


def _broken(source: Source, error: Exception) -> RetrievalError:
    return RetrievalError(f"{source.path}: broken PDF ({_reason(error)}); save it again")


def _reason(error: Exception) -> str:
    return _line(str(error)) or type(error).__name__


def _line(words: str) -> str:
    return " ".join(words.split())


def _page_text(page: PageObject) -> tuple[str, list[str]]:
    """Text of a page, form fields and comments behind it, and why parts of it are missing."""
    parts: list[str] = []
    reasons: list[str] = []
    for read in (_layer, page_annotations):
        try:
            parts.append(read(page, reasons))
        except Exception as error:
            reasons.append(_reason(error))
    if not reasons and _is_damaged(page):
        reasons.append("its content is damaged")
    text = "\n".join(part.strip() for part in parts if part.strip())
    return text.translate(_LIGATURES), reasons


def _layer(page: PageObject, _: list[str]) -> str:
    return str(page.extract_text())


def _is_damaged(page: PageObject) -> bool:
    """Whether compressed content ends early; pypdf then takes what it has without a word."""
    contents = page.get("/Contents")
    contents = contents.get_object() if contents is not None else []
    for item in contents if isinstance(contents, list) else [contents]:
        stream = item.get_object()
        if stream is None or stream.get("/Filter") != "/FlateDecode":
            continue
        inflater, rest = zlib.decompressobj(), bytes(stream._data)
        try:
            while rest and not inflater.eof:
                inflater.decompress(rest, _INFLATE_BYTES)
                rest = inflater.unconsumed_tail
        except zlib.error:
            return True
        if not inflater.eof:
            return True
    return False


def _has_picture(page: PageObject) -> bool:
    try:
        return any(
            form.get_object().get("/Subtype") == "/Image"
            for form in page["/Resources"].get_object()["/XObject"].get_object().values()
        )
    except Exception:  # no resources, or broken ones
        return False


def _title(reader: PdfReader) -> str:
    try:
        return str((reader.metadata.title if reader.metadata else None) or "")
    except Exception:  # broken metadata: the file's name does
        return ""


class _WarningCollector(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """Collect what pypdf logs instead of showing it: it names objects inside the file."""
    logger: Any = logging.getLogger("pypdf")
    collector = _WarningCollector()
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(collector)
    try:
        yield collector.messages
    finally:
        logger.removeHandler(collector)
        logger.propagate = propagate
