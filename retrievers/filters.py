"""Metadata filters: validated once, evaluated on the distinct values of each column.

The language is a mapping. A field maps to a scalar (equality), a list (any of) or a mapping of
operators; several fields must all hold; ``$and``, ``$or`` and ``$not`` combine filters::

    {"lang": "en", "year": {"$gte": 2020, "$lt": 2024}}
    {"$or": [{"title": ["A", "B"]}, {"$not": {"draft": True}}]}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from retrievers.errors import RetrievalError
from retrievers.types import Scalar

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Mask = NDArray[np.bool_]

_OPERATORS = ("$eq", "$ne", "$in", "$nin", "$gt", "$gte", "$lt", "$lte", "$exists")
_COMBINERS = ("$and", "$or", "$not")
_MAX_DEPTH = 32


class ColumnSource(Protocol):
    """Dictionary-encoded columns, as an index stores them."""

    @property
    def num_rows(self) -> int:
        """Rows every column has."""
        ...

    def names(self) -> Sequence[str]:
        """Fields that at least one row carries."""
        ...

    def column(self, name: str) -> tuple[Sequence[Scalar], NDArray[np.int32]]:
        """Distinct values, and for every row the number of its value or -1 for none."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class _Condition:
    field: str
    operator: str
    operand: Scalar | tuple[Scalar, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Combined:
    kind: str
    parts: tuple[_Condition | _Combined, ...]


class Filter:
    """A parsed `where` clause.

    Parameters
    ----------
    where
        Filter in the language of this module.

    Raises
    ------
    RetrievalError
        For an unknown operator, a value of a wrong type, or an empty combination.
    """

    def __init__(self, where: Mapping[str, object]) -> None:
        self._root = _parse(where, 0)

    @property
    def fields(self) -> frozenset[str]:
        """Fields the filter reads."""
        found: set[str] = set()
        stack: list[_Condition | _Combined] = [self._root]
        while stack:
            node = stack.pop()
            if isinstance(node, _Condition):
                found.add(node.field)
            else:
                stack.extend(node.parts)
        return frozenset(found)

    def mask(self, columns: ColumnSource) -> Mask:
        """Rows that pass.

        Parameters
        ----------
        columns
            Columns of the index.

        Returns
        -------
        ndarray
            ``(num_rows,)`` bool. A row that lacks a field fails every condition on it, except
            ``$ne``, ``$nin`` and ``{"$exists": False}``.

        Raises
        ------
        RetrievalError
            For a field that no row carries, which is nearly always a misspelling.
        """
        known = set(columns.names())
        unknown = sorted(self.fields - known)
        if unknown and columns.num_rows:
            raise RetrievalError(
                f"filter field {unknown[0]!r} is carried by no chunk; fields are "
                f"{', '.join(sorted(known)) or 'none'}"
            )
        return _evaluate(self._root, columns)

    def matches(self, values: Mapping[str, Scalar]) -> bool:
        """Whether one row with these fields passes."""
        return _matches(self._root, values)


def _parse(where: object, depth: int) -> _Condition | _Combined:
    if depth > _MAX_DEPTH:
        raise RetrievalError(f"filter is nested more than {_MAX_DEPTH} deep")
    if not isinstance(where, Mapping):
        raise RetrievalError(f"a filter must be a mapping, got {type(where).__name__}")
    if not where:
        raise RetrievalError("a filter must not be empty; leave `where` out to search everything")
    parts = [_parse_entry(str(key), value, depth) for key, value in where.items()]
    return parts[0] if len(parts) == 1 else _Combined(kind="$and", parts=tuple(parts))


def _parse_entry(key: str, value: object, depth: int) -> _Condition | _Combined:
    if key in ("$and", "$or"):
        if not isinstance(value, Sequence) or isinstance(value, str) or not value:
            raise RetrievalError(f"filter {key} needs a list of at least one filter, got {value!r}")
        return _Combined(kind=key, parts=tuple(_parse(part, depth + 1) for part in value))
    if key == "$not":
        return _Combined(kind=key, parts=(_parse(value, depth + 1),))
    if key.startswith("$"):
        raise RetrievalError(
            f"filter operator {key!r} is unknown at this place; allowed are {', '.join(_COMBINERS)}"
        )
    if isinstance(value, Mapping):
        if not value:
            raise RetrievalError(f"filter on {key!r} is empty; operators: {', '.join(_OPERATORS)}")
        parts = [_parse_operator(key, str(name), operand) for name, operand in value.items()]
        return parts[0] if len(parts) == 1 else _Combined(kind="$and", parts=tuple(parts))
    if isinstance(value, list | tuple | set | frozenset):
        return _parse_operator(key, "$in", value)
    return _parse_operator(key, "$eq", value)


def _parse_operator(field: str, operator: str, operand: object) -> _Condition:
    if operator not in _OPERATORS:
        raise RetrievalError(
            f"filter operator {operator!r} on {field!r} is unknown; allowed are "
            f"{', '.join(_OPERATORS)}"
        )
    if operator in ("$in", "$nin"):
        if not isinstance(operand, list | tuple | set | frozenset):
            raise RetrievalError(f"filter {operator} on {field!r} needs a list, got {operand!r}")
        values = tuple(_scalar(field, operator, item) for item in operand)
        return _Condition(field=field, operator=operator, operand=values)
    if operator == "$exists" and not isinstance(operand, bool):
        raise RetrievalError(f"filter $exists on {field!r} needs true or false, got {operand!r}")
    value = _scalar(field, operator, operand)
    if operator in ("$gt", "$gte", "$lt", "$lte") and isinstance(value, bool):
        raise RetrievalError(f"filter {operator} on {field!r} needs a number or text, got {value}")
    return _Condition(field=field, operator=operator, operand=value)


def _scalar(field: str, operator: str, value: object) -> Scalar:
    if isinstance(value, str | int | float | bool) and value == value:  # NaN never equals
        return value
    raise RetrievalError(
        f"filter {operator} on {field!r} needs text, a number or a truth value, got {value!r}"
    )


def _same(left: Scalar, right: Scalar) -> bool:
    # Python's True == 1 would let {"year": 1} select flags.
    return isinstance(left, bool) == isinstance(right, bool) and left == right


def _comparable(left: Scalar, right: Scalar) -> bool:
    if isinstance(left, bool) or isinstance(right, bool):
        return False
    return isinstance(left, str) == isinstance(right, str)


_ORDER: dict[str, Callable[[Scalar, Scalar], bool]] = {
    "$gt": lambda left, right: left > right,  # type: ignore[operator]
    "$gte": lambda left, right: left >= right,  # type: ignore[operator]
    "$lt": lambda left, right: left < right,  # type: ignore[operator]
    "$lte": lambda left, right: left <= right,  # type: ignore[operator]
}


def _holds(condition: _Condition, value: Scalar | None) -> bool:
    operator, operand = condition.operator, condition.operand
    if operator == "$exists":
        return (value is not None) == operand
    if value is None:
        return operator in ("$ne", "$nin")
    if isinstance(operand, tuple):
        found = any(_same(value, item) for item in operand)
        return found == (operator == "$in")
    if operator in ("$eq", "$ne"):
        return _same(value, operand) == (operator == "$eq")
    return _comparable(value, operand) and _ORDER[operator](value, operand)


def _evaluate(node: _Condition | _Combined, columns: ColumnSource) -> Mask:
    import numpy as np

    if isinstance(node, _Condition):
        if node.field not in columns.names():
            return np.full(columns.num_rows, _holds(node, None))
        values, codes = columns.column(node.field)
        # The last entry answers code -1, a row without the field.
        table = np.array([*(_holds(node, value) for value in values), _holds(node, None)])
        picked: Mask = table[codes]
        return picked
    masks = [_evaluate(part, columns) for part in node.parts]
    if node.kind == "$not":
        return ~masks[0]
    combine = np.logical_and if node.kind == "$and" else np.logical_or
    result: Mask = combine.reduce(masks)
    return result


def _matches(node: _Condition | _Combined, values: Mapping[str, Scalar]) -> bool:
    if isinstance(node, _Condition):
        return _holds(node, values.get(node.field))
    results = (_matches(part, values) for part in node.parts)
    if node.kind == "$not":
        return not next(iter(results))
    return all(results) if node.kind == "$and" else any(results)
