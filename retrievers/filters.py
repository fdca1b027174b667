"""Metadata filters: validated once, evaluated on the distinct values of each column.

The language is a mapping. A field maps to a scalar (equality), a list (any of) or a mapping of
operators; several fields must all hold; ``$and``, ``$or`` and ``$not`` combine filters::

    {"lang": "en", "year": {"$gte": 2020, "$lt": 2024}}
    {"$or": [{"title": ["A", "B"]}, {"$not": {"draft": True}}]}
"""

from __future__ import annotations

import reprlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from retrievers.conditions import RANGES, Condition, FieldTable, holds, scalar_key
from retrievers.errors import RetrievalError
from retrievers.types import Scalar

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Mask = NDArray[np.bool_]

_OPERATORS = ("$eq", "$ne", "$in", "$nin", "$gt", "$gte", "$lt", "$lte", "$exists")
_COMBINERS = ("$and", "$or", "$not")
_MAX_DEPTH = 32
# Each condition costs a look at every row, each operand of a list only memory.
MAX_CONDITIONS = 1000
MAX_OPERANDS = 100_000
_SHOWN_FIELDS = 20
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80
_shown = _SHORT.repr


class ColumnSource(Protocol):
    """Dictionary-encoded columns, as an index stores them."""

    @property
    def num_rows(self) -> int:
        """Rows every column has."""
        ...

    def names(self) -> Collection[str]:
        """Fields that at least one row carries."""
        ...

    def column(self, name: str) -> tuple[Sequence[Scalar], NDArray[np.int32]]:
        """Distinct values, and for every row the number of its value or -1 for none."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class _Combined:
    kind: str
    parts: tuple[Condition | _Combined, ...]


class Filter:
    """A parsed `where` clause.

    Parameters
    ----------
    where : mapping
        Filter in the language of this module.

    Raises
    ------
    RetrievalError
        For an unknown operator, a value of a wrong type, an empty combination, or more than
        ``MAX_CONDITIONS`` conditions or ``MAX_OPERANDS`` values in lists.
    """

    def __init__(self, where: Mapping[str, object]) -> None:
        self._root = _Parser().parse(where, 0)

    @property
    def fields(self) -> frozenset[str]:
        """Fields the filter reads."""
        return frozenset(condition.field for condition in _conditions(self._root))

    def mask(self, columns: ColumnSource) -> Mask:
        """Rows that pass.

        Parameters
        ----------
        columns : ColumnSource
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
        known = columns.names()
        unknown = min((field for field in self.fields if field not in known), default=None)
        if unknown is not None and columns.num_rows:
            shown = ", ".join(sorted(known)[:_SHOWN_FIELDS]) or "none"
            more = len(known) - _SHOWN_FIELDS
            raise RetrievalError(
                f"filter field {_shown(unknown)} is carried by no chunk; fields are {shown}"
                + (f" and {more} more" if more > 0 else "")
            )
        return _Evaluation(self._root, columns).mask(self._root)

    def matches(self, values: Mapping[str, Scalar]) -> bool:
        """Whether one row with these fields passes."""
        return _matches(self._root, values)


class _Parser:
    """One pass over a filter, counting what it will cost."""

    def __init__(self) -> None:
        self._num_conditions = 0
        self._num_operands = 0

    def parse(self, where: object, depth: int) -> Condition | _Combined:
        if depth > _MAX_DEPTH:
            raise RetrievalError(f"filter is nested more than {_MAX_DEPTH} deep")
        if not isinstance(where, Mapping):
            raise RetrievalError(f"a filter must be a mapping, got {type(where).__name__}")
        if not where:
            raise RetrievalError(
                "a filter must not be empty; leave `where` out to search everything"
            )
        parts = [self._entry(str(key), value, depth) for key, value in where.items()]
        return parts[0] if len(parts) == 1 else _Combined(kind="$and", parts=tuple(parts))

    def _entry(self, key: str, value: object, depth: int) -> Condition | _Combined:
        if key in ("$and", "$or"):
            if not isinstance(value, Sequence) or isinstance(value, str) or not value:
                raise RetrievalError(
                    f"filter {key} needs a list of at least one filter, got {_shown(value)}"
                )
            return _Combined(kind=key, parts=tuple(self.parse(part, depth + 1) for part in value))
        if key == "$not":
            return _Combined(kind=key, parts=(self.parse(value, depth + 1),))
        if key.startswith("$"):
            raise RetrievalError(
                f"filter operator {_shown(key)} is unknown at this place; allowed are "
                f"{', '.join(_COMBINERS)}"
            )
        if isinstance(value, Mapping):
            if not value:
                raise RetrievalError(
                    f"filter on {_shown(key)} is empty; operators: {', '.join(_OPERATORS)}"
                )
            parts = [self._condition(key, str(name), operand) for name, operand in value.items()]
            return parts[0] if len(parts) == 1 else _Combined(kind="$and", parts=tuple(parts))
        if isinstance(value, list | tuple | set | frozenset):
            return self._condition(key, "$in", value)
        return self._condition(key, "$eq", value)

    def _condition(self, field: str, operator: str, operand: object) -> Condition:
        on = f"on {_shown(field)}"
        if operator not in _OPERATORS:
            raise RetrievalError(
                f"filter operator {_shown(operator)} {on} is unknown; allowed are "
                f"{', '.join(_OPERATORS)}"
            )
        self._num_conditions += 1
        if self._num_conditions > MAX_CONDITIONS:
            raise RetrievalError(
                f"a filter has more than {MAX_CONDITIONS} conditions; give the values of one field "
                "as a list"
            )
        if operator in ("$in", "$nin"):
            if not isinstance(operand, list | tuple | set | frozenset):
                raise RetrievalError(f"filter {operator} {on} needs a list, got {_shown(operand)}")
            self._num_operands += len(operand)
            if self._num_operands > MAX_OPERANDS:
                raise RetrievalError(
                    f"the lists of a filter hold more than {MAX_OPERANDS} values; select on "
                    "a field that fewer values name"
                )
            keys = frozenset(scalar_key(_scalar(field, operator, item)) for item in operand)
            return Condition(field=field, operator=operator, operand=keys)
        if operator == "$exists" and not isinstance(operand, bool):
            raise RetrievalError(f"filter $exists {on} needs true or false, got {_shown(operand)}")
        value = _scalar(field, operator, operand)
        if operator in RANGES and isinstance(value, bool):
            raise RetrievalError(f"filter {operator} {on} needs a number or text, got {value}")
        if operator in ("$eq", "$ne"):
            keys = frozenset([scalar_key(value)])
            return Condition(field=field, operator=operator, operand=keys)
        return Condition(field=field, operator=operator, operand=value)


def _scalar(field: str, operator: str, value: object) -> Scalar:
    if isinstance(value, str | int | float | bool) and value == value:  # NaN never equals
        return value
    raise RetrievalError(
        f"filter {operator} on {_shown(field)} needs text, a number or a truth value, "
        f"got {_shown(value)}"
    )


def _conditions(root: Condition | _Combined) -> Iterator[Condition]:
    stack = [root]
    while stack:
        node = stack.pop()
        if isinstance(node, Condition):
            yield node
        else:
            stack.extend(node.parts)


class _Evaluation:
    """A filter on the columns of one index."""

    def __init__(self, root: Condition | _Combined, columns: ColumnSource) -> None:
        self._columns = columns
        self._wanted: dict[str, list[Condition]] = {}
        for condition in _conditions(root):
            self._wanted.setdefault(condition.field, []).append(condition)
        self._tables: dict[str, tuple[FieldTable, NDArray[np.int32]]] = {}

    def mask(self, node: Condition | _Combined) -> Mask:
        import numpy as np

        if isinstance(node, Condition):
            return self._of_condition(node)
        result = self.mask(node.parts[0])
        if node.kind == "$not":
            return np.logical_not(result, out=result)
        combine = np.logical_and if node.kind == "$and" else np.logical_or
        # In place: a mask has a byte for every row, and a filter may have a thousand of them.
        for part in node.parts[1:]:
            combine(result, self.mask(part), out=result)
        return result

    def _of_condition(self, condition: Condition) -> Mask:
        import numpy as np

        name = condition.field
        if name not in self._columns.names():
            return np.full(self._columns.num_rows, holds(condition, None))
        if name not in self._tables:
            values, codes = self._columns.column(name)
            self._tables[name] = FieldTable(values, self._wanted[name]), codes
        table, codes = self._tables[name]
        # The last answer is that of code -1, a row without the field.
        picked: Mask = table.answers(condition)[codes]
        return picked


def _matches(node: Condition | _Combined, values: Mapping[str, Scalar]) -> bool:
    if isinstance(node, Condition):
        return holds(node, values.get(node.field))
    results = (_matches(part, values) for part in node.parts)
    if node.kind == "$not":
        return not next(iter(results))
    return all(results) if node.kind == "$and" else any(results)
