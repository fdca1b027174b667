"""PDF files, read by pypdf; the text layer only, no character recognition."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from retrievers.errors import RetrievalError
from retrievers.loaders.base import LoadReport, Source, register_loader, whole_file_document
from retrievers.types import Document


@register_loader(".pdf")
def load_pdf(source: Source, report: LoadReport) -> Iterator[Document]:
    """Yield the file as one document, pages parted by a blank line, titled by its metadata.

    Raises
    ------
    RetrievalError
        When the file is encrypted, broken, or has no text layer.
    """
    from pypdf import PdfReader
    from pypdf.errors import DependencyError, PyPdfError

    # Its warnings name objects inside the file; what a user can act on is raised below.
    logging.getLogger("pypdf").addFilter(_only_errors)
    try:
        reader = PdfReader(source.file)
        # Many files are encrypted against editing only and open with the empty password.
        if reader.is_encrypted and not reader.decrypt(""):
            raise RetrievalError(f"{source.path}: encrypted PDF; save it without a password")
        pages = [page.extract_text() for page in reader.pages]
        title = str((reader.metadata.title if reader.metadata else None) or "")
    except RetrievalError:
        raise
    except DependencyError as error:
        raise RetrievalError(f"{source.path}: encrypted PDF; save it without a password") from error
    except OSError:
        raise
    # A damaged file makes pypdf fail in many ways besides its own error class (KeyError,
    # RecursionError, struct and zlib errors); all of them mean the same to the user.
    except (PyPdfError, Exception) as error:
        raise RetrievalError(f"{source.path}: broken PDF ({error}); save it again") from error
    text = "\n\n".join(page.strip() for page in pages if page.strip())
    if not text:
        raise RetrievalError(f"{source.path}: PDF without a text layer; run OCR on it first")
    yield whole_file_document(source, text, kind="pdf", title=title, pages=len(pages))


def _only_errors(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
