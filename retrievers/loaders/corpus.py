"""Folders, files and named corpora to one stream of documents."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from retrievers.errors import RetrievalError
from retrievers.loaders.base import LoadReport, Source, loader_for, one_line, readable_name
from retrievers.loaders.globs import compile_globs
from retrievers.loaders.topics import TOPICS_NAME, load_topics
from retrievers.loaders.walk import Selection, label_folders, walk
from retrievers.types import Document


def load_file(path: str | Path, *, report: LoadReport | None = None) -> Iterator[Document]:
    """Stream the documents of one file.

    Raises
    ------
    RetrievalError
        When the file does not exist, or holds nothing that can be read.
    """
    if not Path(path).is_file():
        raise RetrievalError(f"no such file: {path}; give the path of an existing file")
    return load_corpus([path], report=report)


def load_corpus(
    sources: Sequence[str | Path],
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    report: LoadReport | None = None,
) -> Iterator[Document]:
    """Stream the documents of files, folders and the named corpus ``pydoc-topics``.

    Folders are walked in sorted order. Hidden names are left out, symbolic links followed, a file
    or folder reached twice is read once. The loader is chosen by suffix, plain text for suffixes
    nobody registered. What cannot be read is skipped and counted in `report`.

    A document's id begins with its folder's name (``docs/guide/start.md`` for the folder ``docs``
    wherever it lies), so the same corpus gives the same ids on every machine and two folders do
    not collide; folders of one name given together are told apart by the names above them.

    Parameters
    ----------
    sources : sequence of (str or Path)
        Paths, or ``pydoc-topics``.
    include, exclude : sequence of str
        File patterns on the path below the folder given: ``*.md`` at any depth, ``guide/**``;
        `include` empty takes all. They do not apply to files named in `sources`.
    report : LoadReport, optional
        Filled while iterating.

    Returns
    -------
    iterator of Document
        One at a time; memory is bounded by the largest file, of JSON Lines by the largest line.

    Raises
    ------
    RetrievalError
        At once for a path that does not exist or a bad pattern; from the iterator, at its end,
        when there was not one document, with the reason.
    """
    if isinstance(sources, str | Path):
        sources = [sources]
    if not sources:
        raise RetrievalError(f"nothing to load; give files, folders or {TOPICS_NAME}")
    for source in sources:
        if not Path(source).exists() and str(source) != TOPICS_NAME:
            raise RetrievalError(
                f"no such file or folder: {source}; give an existing path or {TOPICS_NAME}"
            )
    take = compile_globs(include) if include else _everything
    selection = Selection(take, compile_globs(exclude))
    return _stream(sources, selection, report if report is not None else LoadReport())


def _everything(_: str) -> bool:
    return True


def _stream(
    sources: Sequence[str | Path], selection: Selection, report: LoadReport
) -> Iterator[Document]:
    num_before = report.num_documents
    num_found = 0
    seen: set[bytes] = set()  # 8 bytes per document
    for source in _sources(sources, selection, report):
        num_found += 1
        if source is None:
            for document in load_topics():
                report.num_documents += 1
                yield document
        else:
            yield from _documents(source, report, seen)
    if report.num_documents > num_before:
        return
    names = ", ".join(str(source) for source in sources)
    if report.skipped:
        more = f" (and {report.num_skipped - 1} more)" if report.num_skipped > 1 else ""
        path, reason = report.skipped[0]
        raise RetrievalError(f"nothing could be read from {names}: {path}: {reason}{more}")
    if num_found:
        raise RetrievalError(f"no document in {names}")
    raise RetrievalError(
        f"no file to load in {names}; check the folder and the include and exclude patterns"
    )


def _sources(
    given: Sequence[str | Path], selection: Selection, report: LoadReport
) -> Iterator[Source | None]:
    """List every file once; ``None`` stands for the named corpus."""
    homes = [
        path if path.is_dir() else path.parent
        for path in (Path(source).resolve() for source in given if Path(source).exists())
    ]
    labels = label_folders(homes)
    seen: set[tuple[int, int]] = set()
    topics_done = False
    for source in given:
        path = Path(source)
        # What lies on disk wins over the named corpus: it is what the user sees.
        if not path.exists() and str(source) == TOPICS_NAME:
            if not topics_done:
                topics_done = True
                yield None
            continue
        resolved = path.resolve()
        if resolved.is_dir():
            yield from walk(resolved, labels[resolved], selection, seen, report)
        elif not resolved.is_file():
            report.skip(readable_name(str(source)), "not a regular file")
        else:
            status = resolved.stat()
            if (status.st_dev, status.st_ino) not in seen:
                seen.add((status.st_dev, status.st_ino))
                label = labels[resolved.parent]
                name = readable_name(resolved.name)
                yield Source(resolved, f"{label}/{name}", readable_name(str(source)))


def _documents(source: Source, report: LoadReport, seen: set[bytes]) -> Iterator[Document]:
    """Yield one file's documents; a file that fails is reported, those it gave remain.

    Two files may come to one id (``b/c.txt`` of a folder ``a`` and ``c.txt`` of another ``a/b``).
    """
    num_before = report.num_documents
    try:
        for document in loader_for(source.file)(source, report):
            key = hashlib.blake2b(document.id.encode(), digest_size=8).digest()
            if key in seen:
                report.skip(source.path, f"its id {document.id!r} was given before; rename it")
                continue
            seen.add(key)
            report.num_documents += 1
            yield document
    except RetrievalError as error:
        # The list shows the path apart from the reason.
        report.skip(source.path, str(error).removeprefix(f"{source.path}: "))
    except OSError as error:
        report.skip(source.path, f"cannot read it: {error.strerror or error}")
    # A parser that gives up on one file must not end the others; it is named for a report.
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        report.skip(
            source.path, f"its parser failed ({type(error).__name__}: {one_line(str(error))})"
        )
    report.num_files += report.num_documents > num_before
