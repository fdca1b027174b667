"""Reading a data set file: JSON or JSON lines, plain or gzip, format told by its fields."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from rag_eval.datasets.core import Example
from rag_eval.datasets.records import Record, parser_of
from rag_eval.errors import EvalError

FORMATS = (
    "a list of {question, answers, ctxs[{title, text}]}, HotpotQA or 2WikiMultihopQA json, "
    "SQuAD v1.1 json, FlashRAG jsonl, MuSiQue jsonl"
)


def read_examples(path: Path) -> list[Example]:
    """Read every example of a data set file.

    Parameters
    ----------
    path : Path
        ``.json``, ``.jsonl`` or either with ``.gz``; one of the formats in ``FORMATS``.

    Returns
    -------
    list of Example
        In file order, with unique ids (a repeated id gets its position appended).

    Raises
    ------
    EvalError
        The file is missing, empty, not JSON, or a record is not of its format; the message names
        the record.
    """
    examples: list[Example] = []
    seen: set[str] = set()
    expected: str | None = None
    for number, record in enumerate(json_records(path, FORMATS), start=1):
        where = f"{path}: record {number}"
        if not isinstance(record, dict):
            raise EvalError(f"{where} is {type(record).__name__}, expected an object; {FORMATS}")
        found = parser_of(record)
        if found is None:
            fields = ", ".join(sorted(map(str, record))) or "none"
            raise EvalError(
                f"{where} is in no known format (its fields: {fields}); known: {FORMATS}"
            )
        name, parse = found
        if expected is not None and name != expected:
            raise EvalError(f"{where} looks like {name}, but the file began as {expected}")
        expected = name
        for example in _parsed(parse(record, f"{path.name}:{number}"), where, name):
            unique = example.id
            if unique in seen:
                unique = f"{example.id}#{len(examples)}"
                example = replace(example, id=unique)
            seen.add(unique)
            examples.append(example)
    if not examples:
        raise EvalError(f"{path} holds no example; expected {FORMATS}")
    return examples


def _parsed(items: Iterator[Example], where: str, name: str) -> Iterator[Example]:
    try:
        yield from items
    except KeyError as error:
        raise EvalError(f"{where} ({name}) lacks the field {error}") from error
    except (TypeError, ValueError, AttributeError, IndexError) as error:
        raise EvalError(f"{where} ({name}) is not well formed: {error}") from error


def json_records(path: Path, expected: str) -> Iterator[Any]:
    """Records of a JSON or JSON lines file, plain or gzip; `expected` names the formats for an empty file.

    Raises
    ------
    EvalError
        The file is missing, empty or not JSON.
    """
    if not path.is_file():
        raise EvalError(f"data set {path} is not a file; give a file or a generator's name")
    try:
        raw = path.read_bytes()
        if path.suffix == ".gz":
            raw = gzip.decompress(raw)
        text = raw.decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise EvalError(f"{path} cannot be read as UTF-8 text: {error}") from error
    if not text.strip():
        raise EvalError(f"{path} is empty; expected {expected}")
    try:
        whole = json.loads(text)
    except json.JSONDecodeError as error:
        # Two documents one after the other ("Extra data") is what JSON lines look like to a
        # parser; anything else on the first line is a broken file.
        if error.msg != "Extra data":
            first = text.lstrip().split("\n", 1)[0]
            if not _is_json(first):
                raise EvalError(
                    f"{path}: line {error.lineno}, column {error.colno} is not JSON ({error.msg})"
                ) from error
        yield from _lines(path, text)
        return
    if isinstance(whole, dict) and isinstance(whole.get("data"), list):
        yield from whole["data"]
    elif isinstance(whole, list):
        yield from whole
    else:
        yield whole


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except json.JSONDecodeError:
        return False
    return True


def _lines(path: Path, text: str) -> Iterator[Record]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            raise EvalError(f"{path}: line {number} is not JSON ({error.msg})") from error
