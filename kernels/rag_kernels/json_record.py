"""A dataclass as the text of a JSON file: its fields, and the number of the file's format."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    T = TypeVar("T", bound=DataclassInstance)


def to_text(record: DataclassInstance, version: int) -> str:
    """Text of a file; :func:`from_text` reads it. A number that JSON does not have raises :class:`ValueError`."""
    return json.dumps({"format": version, **asdict(record)}, indent=1, allow_nan=False) + "\n"


def from_text(
    kind: type[T], text: str, version: int, what: str, read: Mapping[str, Callable[[Any], object]]
) -> T:
    """Read the text of a file.

    Parameters
    ----------
    kind : type
        The dataclass.
    text : str
        Of the file.
    version : int
        Of the format; others are refused.
    what : str
        What the file is, for a refusal: ``a table of thresholds``.
    read : mapping of str to callable
        Makes the values of some fields from what JSON has, such as tuples.

    Raises
    ------
    ValueError
        One line: what is wrong with it, or what the dataclass itself refuses.
    """
    data = json.loads(text)
    if not isinstance(data, dict) or data.pop("format", None) != version:
        raise ValueError(f"not {what} of format {version}")
    try:
        return kind(**data | {name: make(data[name]) for name, make in read.items()})
    except (KeyError, TypeError) as error:
        raise ValueError(f"{what} lacks or has too many fields: {error}") from None


def reason_of(error: Exception) -> str:
    """First line of an error, for a refusal of one line; its type where it says nothing."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__
