"""JSON and JSON Lines data sets: their passages become documents, each once a file."""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator

from retrievers.errors import RetrievalError
from retrievers.loaders.base import LoadReport, Source, clean_text, one_line, register_loader
from retrievers.loaders.passages import SHAPES, Passage, passages_of
from retrievers.loaders.text import decode
from retrievers.types import Document

# What passages_of raises for a record of the right shape with something wrong inside.
_MALFORMED = (TypeError, KeyError, ValueError, AttributeError)


class _Collector:
    """Turns the passages of one file into documents, each content once."""

    def __init__(self, source: Source, report: LoadReport) -> None:
        self.source = source
        self.report = report
        # 16 bytes a passage: the only memory that grows with the file.
        self._seen: set[bytes] = set()
        self._keys: dict[str, bytes] = {}
        self.count = 0

    def add(self, passage: Passage) -> Document | None:
        text = clean_text(passage.text)
        if not text.strip():
            return None
        title = one_line(passage.title) or self.source.file.name.split(".")[0]
        digest = hashlib.blake2b(f"{title}\0{text}".encode(), digest_size=16).digest()
        key = digest.hex() if passage.key is None else one_line(passage.key)
        if digest in self._seen:
            self.report.num_duplicates += 1
            return None
        if passage.key is not None and self._keys.setdefault(key, digest) != digest:
            raise ValueError(f"id {key!r} was used before for another text")
        self._seen.add(digest)
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
                # The first record tells a file of another kind from one with a bad record.
                if not self.count:
                    raise RetrievalError(f"{place}: no passages in this record; known: {SHAPES}")
                self.report.skip(place, "record without passages")
                continue
            try:
                for passage in passages:
                    if (document := self.add(passage)) is not None:
                        yield document
            except _MALFORMED as error:
                self.report.skip(place, f"malformed record: {error or type(error).__name__}")
        if not self.count:
            raise RetrievalError(f"{self.source.path}: no passage with text in it")


@register_loader(".jsonl", ".ndjson", ".jsonl.gz")
def load_jsonl(source: Source, report: LoadReport) -> Iterator[Document]:
    """Yield the passages of a JSON Lines file, reading line by line.

    A line that is not JSON, or lacks what its shape needs, is skipped and counted.
    """

    def numbered() -> Iterator[tuple[str, object]]:
        opener = gzip.open if source.file.suffix == ".gz" else open
        with opener(source.file, "rb") as lines:
            try:
                for number, line in enumerate(lines, start=1):
                    place = f"{source.path}:{number}"
                    if not line.strip():
                        continue
                    try:
                        yield place, json.loads(line.decode("utf-8-sig"))
                    except (ValueError, RecursionError) as error:
                        if b"\0" in line:
                            raise RetrievalError(f"{source.path}: binary file") from error
                        report.skip(place, f"not JSON: {error}")
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise RetrievalError(f"{source.path}: broken gzip file ({error})") from error

    yield from _Collector(source, report).records(numbered())


@register_loader(".json", ".json.gz")
def load_json(source: Source, report: LoadReport) -> Iterator[Document]:
    """Yield the passages of a JSON file: one record, or a list of records.

    The file is parsed whole, so its size bounds the memory; JSON Lines streams.
    """
    payload = source.file.read_bytes()
    if source.file.suffix == ".gz":
        try:
            payload = gzip.decompress(payload)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise RetrievalError(f"{source.path}: broken gzip file ({error})") from error
    try:
        content = json.loads(decode(payload, source.path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise RetrievalError(f"{source.path}: not JSON ({error})") from error
    records = content if isinstance(content, list) else [content]
    numbered = ((f"{source.path}[{i}]", record) for i, record in enumerate(records))
    yield from _Collector(source, report).records(numbered)
