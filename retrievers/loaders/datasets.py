"""JSON and JSON Lines data sets: their passages become documents.

A passage without an id of its own becomes one document however often the file has it.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from retrievers.errors import RetrievalError
from retrievers.loaders.base import LoadReport, Source, clean_text, one_line, register_loader
from retrievers.loaders.encoding import decode, marked_encoding, nearly_utf8
from retrievers.loaders.encoding_guess import GUESS_BYTES, guess_encoding
from retrievers.loaders.passages import SHAPES, Passage, passages_of
from retrievers.types import Document

# What passages_of raises for a record of the right shape with something wrong inside.
_MALFORMED = (TypeError, KeyError, ValueError, AttributeError, RecursionError)
_MAX_FOREIGN = 1000


class _RecordCollector:
    """Turns the passages of one file into documents."""

    def __init__(self, source: Source, report: LoadReport) -> None:
        self.source = source
        self.report = report
        # The only memory that grows with the file: 16 bytes per passage, and the ids it gives.
        self._seen: set[bytes] = set()
        self._keys: dict[str, bytes] = {}
        self._num_foreign = 0
        self.count = 0

    def add(self, passage: Passage) -> Document | None:
        text = clean_text(passage.text)
        if not text.strip():
            return None
        title = one_line(passage.title) or Path(self.source.path).name.split(".")[0]
        content = f"{title}\0{text}"
        if passage.metadata:
            content += f"\0{json.dumps(passage.metadata, sort_keys=True)}"
        digest = hashlib.blake2b(content.encode(), digest_size=16).digest()
        key = one_line(passage.key or "")
        if key:
            is_known = key in self._keys
            if self._keys.setdefault(key, digest) != digest:
                raise ValueError(f"id {key!r} was used before for another text")
        else:
            key, is_known = digest.hex(), digest in self._seen
            self._seen.add(digest)
        if is_known:
            self.report.num_duplicates += 1
            return None
        self.count += 1
        return Document(
            id=f"{self.source.id}#{key}",
            text=text,
            title=title,
            path=self.source.path,
            metadata={"format": passage.format, **passage.metadata},
        )

    def records(self, numbered: Iterator[tuple[str, object]]) -> Iterator[Document]:
        for place, record in numbered:
            passages = passages_of(record)
            if passages is None:
                self._num_foreign += 1
                known = f"; known: {SHAPES}" if self._num_foreign == 1 else ""
                self.report.skip(place, f"no passages in this record{known}")
                # A file of another kind, not one with a bad record.
                if not self.count and self._num_foreign >= _MAX_FOREIGN:
                    break
                continue
            try:
                for passage in passages:
                    if (document := self.add(passage)) is not None:
                        yield document
            except _MALFORMED as error:
                self.report.skip(place, f"malformed record: {error or type(error).__name__}")
        if not self.count:
            raise RetrievalError(f"{self.source.path}: no passage with text in it")


def _open(source: Source) -> BinaryIO:
    opened = gzip.open if source.file.suffix.lower() == ".gz" else open
    return cast(BinaryIO, opened(source.file, "rb"))


def _lines(source: Source, report: LoadReport) -> Iterator[tuple[int, str]]:
    """Yield numbered lines, one in memory at a time; those that are not UTF-8 as they are guessed."""
    with _open(source) as file:
        head = file.read(4)
    with _open(source) as file:
        if (encoding := marked_encoding(head)) is not None:
            try:
                yield from enumerate(io.TextIOWrapper(file, encoding, newline="\n"), start=1)
            except UnicodeDecodeError as error:
                raise RetrievalError(f"{source.path}: not valid {encoding}") from error
            return
        refusal = ""
        for number, raw in enumerate(file, start=1):
            try:
                yield number, raw.decode("utf-8-sig")
                continue
            except UnicodeDecodeError:
                place = f"{source.path}:{number}"
            if (line := nearly_utf8(raw, place, report)) is not None:
                yield number, line
                continue
            if encoding is None and not refusal:
                # Each line alone is too little to tell by.
                try:
                    encoding = guess_encoding(_foreign_lines(source), source.path)
                except RetrievalError as error:
                    refusal = str(error).removeprefix(f"{source.path}: ")
            if encoding is None:
                report.skip(place, refusal)
                continue
            report.note(place, f"read as {encoding}, a guess; save it as UTF-8")
            yield number, raw.decode(encoding, "replace")


def _foreign_lines(source: Source) -> bytes:
    """Lines that are not UTF-8, as many as a guess needs."""
    found: list[bytes] = []
    size = 0
    with _open(source) as file:
        for raw in file:
            try:
                raw.decode("utf-8")
            except UnicodeDecodeError:
                found.append(raw)
                size += len(raw)
                if size >= GUESS_BYTES:
                    break
    return b"".join(found)


@register_loader(".jsonl", ".ndjson", ".jsonl.gz")
def load_jsonl(source: Source, report: LoadReport) -> Iterator[Document]:
    """Yield the passages of a JSON Lines file, reading line by line.

    A line that is not JSON, or lacks what its shape needs, is skipped and counted.
    """

    def numbered() -> Iterator[tuple[str, object]]:
        try:
            for number, line in _lines(source, report):
                place = f"{source.path}:{number}"
                if not line.strip():
                    continue
                try:
                    yield place, json.loads(line)
                except (ValueError, RecursionError) as error:
                    if "\0" in line:
                        raise RetrievalError(f"{source.path}: binary file") from error
                    report.skip(place, f"not JSON: {error}")
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise RetrievalError(f"{source.path}: broken gzip file ({error})") from error

    yield from _RecordCollector(source, report).records(numbered())


@register_loader(".json", ".json.gz")
def load_json(source: Source, report: LoadReport) -> Iterator[Document]:
    """Yield the passages of a JSON file: one record, or a list of records.

    The file is parsed whole, so its size bounds the memory; JSON Lines streams.
    """
    try:
        with _open(source) as file:
            payload = file.read()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise RetrievalError(f"{source.path}: broken gzip file ({error})") from error
    text = decode(payload, source.path, report=report)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RetrievalError(f"{source.path}: not JSON ({error})") from error
    records = content if isinstance(content, list) else [content]
    numbered = ((f"{source.path}[{i}]", record) for i, record in enumerate(records))
    yield from _RecordCollector(source, report).records(numbered)
