"""One door to the files of long conversations; the format is told by its fields."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rag_eval.datasets.files import json_records
from rag_eval.datasets.locomo import parse_locomo
from rag_eval.datasets.longmemeval import parse_longmemeval
from rag_eval.datasets.realtalk import parse_realtalk
from rag_eval.datasets.talks import Conversation
from rag_eval.errors import EvalError

TALK_FORMATS = "LoCoMo json, a REALTALK file or the folder of them, LongMemEval json"

Parser = Callable[[Mapping[str, Any], str], Conversation]

_MARKS: tuple[tuple[str, str, Parser], ...] = (
    ("haystack_sessions", "LongMemEval", parse_longmemeval),
    ("conversation", "LoCoMo", parse_locomo),
    ("session_1", "REALTALK", parse_realtalk),
)
"""Formats by the field that only they have."""


def read_conversations(path: Path | str) -> list[Conversation]:
    """Read every conversation of a file, or of the JSON files of a folder.

    Parameters
    ----------
    path : Path or str
        ``.json`` or ``.jsonl``, either also with ``.gz``; one of :data:`TALK_FORMATS`.

    Returns
    -------
    list of Conversation
        In the file's order, files by name, with unique ids.

    Raises
    ------
    EvalError
        A file is missing, empty, not JSON, or a record is not of its format; the message names the record.
    """
    path = Path(path)
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files:
        raise EvalError(f"{path} holds no .json file; expected {TALK_FORMATS}")
    found: list[Conversation] = []
    for file in files:
        for number, record in enumerate(json_records(file, TALK_FORMATS), start=1):
            found.append(_read(record, file, number))
    counts = Counter(conversation.id for conversation in found)
    twice, count = counts.most_common(1)[0]
    if count > 1:
        raise EvalError(f"{path} holds {count} conversations {twice!r}; give each an id of its own")
    return found


def _read(record: Any, file: Path, number: int) -> Conversation:
    where = f"{file}: record {number}"
    if not isinstance(record, dict):
        raise EvalError(f"{where} is {type(record).__name__}, expected an object; {TALK_FORMATS}")
    name, parse = next(
        ((name, parse) for mark, name, parse in _MARKS if mark in record), ("", None)
    )
    if parse is None:
        fields = ", ".join(sorted(map(str, record))[:8]) or "none"
        raise EvalError(
            f"{where} is in no known format (its fields: {fields}); known: {TALK_FORMATS}"
        )
    try:
        return parse(record, file.stem if number == 1 else f"{file.stem}-{number}")
    except KeyError as error:
        raise EvalError(f"{where} ({name}) lacks the field {error}") from error
    except (TypeError, ValueError, AttributeError, IndexError) as error:
        raise EvalError(f"{where} ({name}) is not well formed: {error}") from error
