"""Metadata of LangChain documents as an index holds it: fields to filter on, and the rest as JSON.

LangChain lets any Python value stand in metadata; an index has columns of texts, numbers and truth
values. What a column cannot give back is kept beside it, written as JSON with the name of its type.
Reading never imports a module and never calls anything but the constructors named here.
"""

from __future__ import annotations

import base64
import json
import math
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum, EnumType
from fractions import Fraction
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import numpy as np

from retrievers import RetrievalError
from retrievers.types import Scalar

REST_FIELD = "langchain_json"
"""Metadata field that carries, as JSON, what the columns of an index cannot give back."""

_RESERVED = frozenset({"document_id", "title", "path", REST_FIELD})
_TAG = "$type"


def split_metadata(metadata: Mapping[Any, Any], name: str) -> dict[str, Scalar]:
    """Fields that an index can store, the rest among them under :data:`REST_FIELD`.

    Parameters
    ----------
    metadata : mapping
        Of a document.
    name : str
        The document's, for the message.

    Returns
    -------
    dict
        Texts, numbers and truth values by name. Dates, times, UUIDs, paths, decimals and enumeration
        members are there too, as the scalar that a filter compares.

    Raises
    ------
    RetrievalError
        A value of a type that cannot be given back.
    """
    columns: dict[str, Scalar] = {}
    rest: dict[str, Any] = {}
    odd: list[list[Any]] = []
    for key, value in metadata.items():
        scalar = scalar_of(value)
        storable = isinstance(key, str) and is_writable(key)
        if storable and scalar is not None and key not in _RESERVED and not key.startswith("$"):
            columns[key] = scalar
            if not _needs_tag(value):
                continue
        try:
            kept = _encode(value)
        except (TypeError, ValueError, RecursionError) as error:
            reason = "nested too deeply" if isinstance(error, RecursionError) else error
            raise RetrievalError(
                f"metadata of document {name!r} cannot be stored ({key!r}: {reason}); use texts, "
                "numbers, truth values, None, dates, lists and mappings"
            ) from None
        if storable:
            rest[key] = kept
        else:
            odd.append([_encode(key), kept])
    if rest or odd:
        columns[REST_FIELD] = json.dumps([rest, odd] if odd else rest, sort_keys=True)
    return columns


def join_metadata(columns: Mapping[str, Scalar]) -> dict[Any, Any]:
    """Metadata as it was before :func:`split_metadata`."""
    metadata: dict[Any, Any] = dict(columns)
    text = metadata.pop(REST_FIELD, None)
    if text is not None:
        rest = json.loads(str(text))
        rest, odd = rest if isinstance(rest, list) else (rest, ())
        metadata |= {key: _decode(value) for key, value in rest.items()}
        metadata |= {_decode(key): _decode(value) for key, value in odd}
    return metadata


def scalar_of(value: object) -> Scalar | None:
    """What a filter compares for a value; None for what no filter can compare."""
    if isinstance(value, Enum):
        return scalar_of(value.value)
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, str):
        text = str.__str__(value)
        return text if is_writable(text) else None
    if isinstance(value, int | np.integer) and not isinstance(value, np.timedelta64):
        return int(value)
    if isinstance(value, float | np.floating | Decimal):
        number = float(value) if not isinstance(value, Decimal) or value.is_finite() else math.nan
        return number if math.isfinite(number) else None
    if isinstance(value, datetime):
        return (value if value.tzinfo is None else value.astimezone(UTC)).isoformat()
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, UUID | PurePath):
        return scalar_of(str(value))
    return None


def as_where(where: Mapping[str, object] | None) -> dict[str, object] | None:
    """Write a filter in the scalars that the columns hold; an empty one is no filter."""
    if not isinstance(where, Mapping):
        return where  # what is no mapping is refused by the filter itself
    return {key: _comparable(value) for key, value in where.items()} or None


def _comparable(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _comparable(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_comparable(item) for item in value]
    scalar = scalar_of(value)
    return value if scalar is None else scalar


def is_writable(text: str) -> bool:
    """Whether a text can be written: half a surrogate pair cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _needs_tag(value: object) -> bool:
    """Whether a column gives back something that is not equal to the value."""
    if isinstance(value, Enum):
        return True
    return not isinstance(value, str | int | float | np.integer | np.floating | np.bool_)


def _zone_text(value: datetime | time) -> list[Any]:
    zone = value.tzinfo.key if isinstance(value.tzinfo, ZoneInfo) else None
    return [value.isoformat(), zone, value.fold]


def _zoned(kind: type[datetime] | type[time], text: str, zone: str | None, fold: int) -> Any:
    found = kind.fromisoformat(text).replace(fold=fold)
    if zone is None:
        return found
    try:
        return found.replace(tzinfo=ZoneInfo(zone))
    except ZoneInfoNotFoundError:  # a machine without time zone data: the offset alone
        return found


def _member(module: str, kind: str, name: str, value: Any) -> Any:
    """Member of an enumeration that this process has; its value where it has not."""
    found: Any = sys.modules.get(module)
    for part in kind.split("."):
        found = getattr(found, part, None)
    if not isinstance(found, EnumType):
        return value
    members: Mapping[str, Any] = found.__members__
    if name in members:
        return members[name]
    try:
        return found(value)  # several flags together have no name of their own
    except ValueError:
        return value


_PATHS: dict[str, type[PurePath]] = {
    kind.__name__: kind for kind in (PurePosixPath, PureWindowsPath, Path)
}

_WRITERS: tuple[tuple[Any, str, Callable[[Any], Any]], ...] = (
    (datetime, "datetime", _zone_text),
    (date, "date", date.isoformat),
    (time, "time", _zone_text),
    (timedelta, "timedelta", lambda v: [v.days, v.seconds, v.microseconds]),
    (np.datetime64, "datetime64", lambda v: [str(v), np.datetime_data(v.dtype)]),
    (np.timedelta64, "timedelta64", lambda v: [str(v.astype(np.int64)), np.datetime_data(v.dtype)]),
    (Decimal, "decimal", str),
    (Fraction, "fraction", str),
    (complex, "complex", lambda v: [v.real, v.imag]),
    (UUID, "uuid", str),
    (Path, "path", lambda v: ["Path", str(v)]),
    (PureWindowsPath, "path", lambda v: ["PureWindowsPath", str(v)]),
    (PurePath, "path", lambda v: ["PurePosixPath", str(v)]),
    (bytes, "bytes", lambda v: base64.b64encode(v).decode("ascii")),
    (tuple, "tuple", lambda v: [_encode(item) for item in v]),
    (set, "set", lambda v: [_encode(item) for item in v]),
    (frozenset, "frozenset", lambda v: [_encode(item) for item in v]),
)
"""Type, its name in JSON, and what is written; the first that fits is taken."""

_READERS: dict[str, Callable[[Any], Any]] = {
    "datetime": lambda v: _zoned(datetime, *v),
    "date": date.fromisoformat,
    "time": lambda v: _zoned(time, *v),
    "timedelta": lambda v: timedelta(*v),
    "datetime64": lambda v: np.datetime64(v[0], tuple(v[1])),
    "timedelta64": lambda v: np.timedelta64(int(v[0]), tuple(v[1])),
    "decimal": Decimal,
    "fraction": Fraction,
    "complex": lambda v: complex(*v),
    "uuid": UUID,
    "path": lambda v: _PATHS[v[0]](v[1]),
    "bytes": base64.b64decode,
    "tuple": lambda v: tuple(_decode(item) for item in v),
    "set": lambda v: {_decode(item) for item in v},
    "frozenset": lambda v: frozenset(_decode(item) for item in v),
    "enum": lambda v: _member(v[0], v[1], v[2], _decode(v[3])),
    "array": lambda v: np.array(_decode(v[1]), dtype=v[0]).reshape(v[2]),
    "mapping": lambda v: {_decode(key): _decode(item) for key, item in v},
}


def _encode(value: Any) -> Any:
    """JSON of a value; raises TypeError for what cannot be given back."""
    if isinstance(value, Enum):
        kind = type(value)
        parts = [kind.__module__, kind.__qualname__, str(value.name), _encode(value.value)]
        return {_TAG: "enum", "value": parts}
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, np.bool_ | np.integer | np.floating) and not isinstance(
        value, np.timedelta64
    ):
        return scalar_of(value) if np.isfinite(value) else float(value)
    if isinstance(value, list):
        return [_encode(item) for item in value]
    if isinstance(value, Mapping):
        if _TAG not in value and all(isinstance(key, str) for key in value):
            return {key: _encode(item) for key, item in value.items()}
        pairs = [[_encode(key), _encode(item)] for key, item in value.items()]
        return {_TAG: "mapping", "value": pairs}
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufU":
        flat = [_encode(item) for item in value.ravel().tolist()]
        return {_TAG: "array", "value": [value.dtype.str, flat, list(value.shape)]}
    for kind, name, write in _WRITERS:
        if isinstance(value, kind):
            written = {_TAG: name, "value": write(value)}
            # A subclass may carry more than its base: pandas' NaT is a datetime without a date.
            if type(value) is not kind and _decode(json.loads(json.dumps(written))) != value:
                break
            return written
    raise TypeError(f"a {type(value).__name__} has no form that is kept")


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return [_decode(item) for item in value]
    if isinstance(value, dict):
        if _TAG in value:
            return _READERS[value[_TAG]](value["value"])
        return {key: _decode(item) for key, item in value.items()}
    return value
