"""What every loader shares: the registry by file suffix, clean text, and what was skipped."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from retrievers.errors import RetrievalError
from retrievers.metadata import storable_text
from retrievers.types import Document


class SkippedSource(NamedTuple):
    """A file, directory or line that gave no document, and why."""

    path: str
    reason: str


_MAX_LISTED = 100


@dataclass(kw_only=True, slots=True)
class LoadReport:
    """Running account of a load; complete once the iterator is exhausted.

    Parameters
    ----------
    num_files : int
        Files that gave at least one document.
    num_documents : int
        Documents yielded.
    num_duplicates : int
        Passages left out because the same file had them before.
    num_skipped : int
        Files, directories and lines that gave nothing.
    skipped : list of SkippedSource
        The first 100 of those, with the reason.
    notes : list of SkippedSource
        The first 100 remarks on what was read all the same: a guessed encoding, bytes lost.
    """

    num_files: int = 0
    num_documents: int = 0
    num_duplicates: int = 0
    num_skipped: int = 0
    skipped: list[SkippedSource] = field(default_factory=list)
    notes: list[SkippedSource] = field(default_factory=list)

    def skip(self, path: str, reason: str) -> None:
        """Count one skipped source."""
        self.num_skipped += 1
        if len(self.skipped) < _MAX_LISTED:
            self.skipped.append(SkippedSource(path, reason))

    def note(self, path: str, words: str) -> None:
        """Remark on a source that was read."""
        if len(self.notes) < _MAX_LISTED:
            self.notes.append(SkippedSource(path, words))


class Source(NamedTuple):
    """A file to load and what it is called.

    Attributes
    ----------
    file : Path
        Where it lies.
    id : str
        Stable identifier for its document, or the prefix of its documents' identifiers.
    path : str
        What :attr:`Document.path` shows.
    """

    file: Path
    id: str
    path: str


Loader = Callable[[Source, LoadReport], Iterator[Document]]
"""Yields the documents of one file; raises :class:`RetrievalError` when it holds none it can read."""

_LOADERS: dict[str, Loader] = {}


def register_loader(*suffixes: str) -> Callable[[Loader], Loader]:
    """Make the decorated function the loader of files with these suffixes (lower case, with dot)."""

    def decorate(loader: Loader) -> Loader:
        for suffix in suffixes:
            if suffix in _LOADERS:
                raise RetrievalError(f"suffix {suffix} already has a loader")
            _LOADERS[suffix] = loader
        return loader

    return decorate


def loader_for(file: Path) -> Loader:
    """Pick the loader by suffix; plain text for a suffix nobody registered."""
    suffix = file.suffix.lower()
    if suffix == ".gz" and len(file.suffixes) > 1:
        suffix = file.suffixes[-2].lower() + suffix
    return _LOADERS.get(suffix, _LOADERS[".txt"])


def known_suffixes() -> list[str]:
    """List all registered suffixes, sorted."""
    return sorted(_LOADERS)


def clean_text(text: str) -> str:
    r"""Normalise line ends to ``\n`` and drop what no tokenizer or reader can use.

    NUL, soft hyphens and a leading byte-order mark go, which no reader sees; lone surrogates
    (broken JSON escapes) become U+FFFD.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "").removeprefix("\ufeff")
    return text if text.isascii() else storable_text(text.replace("\xad", ""))


_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def readable_name(name: str) -> str:
    r"""Make a file name storable and printable: ``caf\xe9.txt`` for bytes that are not UTF-8."""
    name = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), name)


def one_line(text: str) -> str:
    """Join `text` to one line with single spaces; for titles."""
    return " ".join(clean_text(text).split())


def whole_file_document(
    source: Source, text: str, *, kind: str, title: str = "", pages: int | None = None
) -> Document:
    """Build the document of a file that is one document.

    Raises
    ------
    RetrievalError
        When `text` is blank.
    """
    text = clean_text(text)
    if not text.strip():
        raise RetrievalError(f"{source.path}: holds no text")
    metadata: dict[str, str | int | float | bool] = {"format": kind}
    if pages is not None:
        metadata["pages"] = pages
    return Document(
        id=source.id,
        text=text,
        title=one_line(title) or Path(source.path).stem,
        path=source.path,
        metadata=metadata,
    )
