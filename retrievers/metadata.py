"""Documents as they are stored: text that UTF-8 holds, metadata that JSON and a filter hold."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from retrievers.types import Document, Scalar

_SURROGATES = re.compile("[\ud800-\udfff]")
# JSON clients read 64 bits; digits beyond are kept as text.
_MAX_INT = 2**63


def storable_document(document: Document) -> Document:
    """Replace what no index can hold, so that one document does not end the ingest at its commit."""
    return replace(
        document,
        id=storable_text(document.id),
        text=storable_text(document.text),
        title=storable_text(document.title),
        path=None if document.path is None else storable_text(document.path),
        metadata=storable_metadata(document.metadata),
    )


def storable_text(text: str) -> str:
    """Replace lone surrogates (broken escapes), which UTF-8 cannot hold."""
    return text if text.isascii() else _SURROGATES.sub("\ufffd", text)


def storable_metadata(given: Mapping[Any, Any]) -> dict[str, Scalar]:
    """Turn any metadata into scalars: no value may stop an ingest.

    Nulls and NaN are left out, as a field that is not there. What is no scalar (lists, dates)
    becomes text: JSON where it can be, else as Python prints it.
    """
    stored: dict[str, Scalar] = {}
    for key, value in given.items():
        if value is None or (isinstance(value, float) and math.isnan(value)):
            continue
        stored[storable_text(str(key))] = _scalar(value)
    return stored


def _scalar(value: object) -> Scalar:
    if isinstance(value, bool):
        return value
    if isinstance(value, str):
        return storable_text(str(value))
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(value)
    if isinstance(value, int):
        return int(value) if -_MAX_INT <= value < _MAX_INT else _digits(value)
    if isinstance(value, Mapping | list | tuple):
        try:
            return json.dumps(value)
        except (TypeError, ValueError, RecursionError):
            pass
    return storable_text(str(value))


def _digits(value: int) -> str:
    try:
        return str(value)
    except ValueError:  # more digits than Python writes
        return hex(value)
