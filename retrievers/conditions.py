"""One condition of a filter: on a single value, and on all distinct values of a column at once.

A filter comes from a client and may hold as many words as a request is long, and a column as many
values as an index has documents. Their product is never gone through: equality is looked up, and a
range by bisection among the bounds that the filter names.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from retrievers.types import Scalar

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Key = tuple[bool, Scalar]
"""Whether it is a truth value, and the value: Python's ``True == 1`` would let 1 select flags."""

RANGES = ("$gt", "$gte", "$lt", "$lte")
_ORDER: dict[str, Callable[[Scalar, Scalar], bool]] = {
    "$gt": lambda left, right: left > right,  # type: ignore[operator]
    "$gte": lambda left, right: left >= right,  # type: ignore[operator]
    "$lt": lambda left, right: left < right,  # type: ignore[operator]
    "$lte": lambda left, right: left <= right,  # type: ignore[operator]
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Condition:
    """A field, an operator and its operand; that of an equality is the set of keys it may equal."""

    field: str
    operator: str
    operand: Scalar | frozenset[Key]


def scalar_key(value: Scalar) -> Key:
    """Key under which equal values are found."""
    # A member of an enum hashes unlike the text or number that it equals.
    if isinstance(value, str):
        return False, str.__str__(value)
    if isinstance(value, bool):
        return True, value
    return False, int.__pos__(value) if isinstance(value, int) else float.__pos__(value)


def holds(condition: Condition, value: Scalar | None) -> bool:
    """Whether one value, ``None`` for a missing one, fulfils a condition."""
    operator, operand = condition.operator, condition.operand
    if operator == "$exists":
        return (value is not None) == operand
    if value is None:
        return operator in ("$ne", "$nin")
    if isinstance(operand, frozenset):
        return (scalar_key(value) in operand) == (operator in ("$eq", "$in"))
    return _comparable(value, operand) and _ORDER[operator](value, operand)


def _comparable(left: Scalar, right: Scalar) -> bool:
    if isinstance(left, bool) or isinstance(right, bool):
        return False
    return isinstance(left, str) == isinstance(right, str)


class FieldTable:
    """The distinct values of a column, gone through once for all conditions of a filter on it.

    Parameters
    ----------
    values : sequence of Scalar
        Distinct values of the column.
    conditions : iterable of Condition
        Every condition that will be asked for.
    """

    def __init__(self, values: Sequence[Scalar], conditions: Iterable[Condition]) -> None:
        import numpy as np

        self._num_values = len(values)
        self._codes: dict[Key, list[int]] = {}
        bounds: dict[bool, set[Scalar]] = {False: set(), True: set()}
        for condition in conditions:
            operand = condition.operand
            if isinstance(operand, frozenset):
                self._codes.update((key, []) for key in operand)
            elif condition.operator in RANGES:
                bounds[isinstance(operand, str)].add(operand)
        self._bounds = {is_text: sorted(found) for is_text, found in bounds.items()}
        # Twice the number of bounds below the value, one more where it is a bound; -1: no order.
        self._ranks = {
            is_text: np.full(self._num_values, -1, dtype=np.int32) for is_text in (False, True)
        }
        for code, value in enumerate(values):
            if self._codes and (codes := self._codes.get(scalar_key(value))) is not None:
                codes.append(code)
            is_text = isinstance(value, str)
            if (found := self._bounds[is_text]) and not isinstance(value, bool) and value == value:
                place = bisect_left(found, value)
                is_bound = place < len(found) and found[place] == value
                self._ranks[is_text][code] = 2 * place + is_bound

    def answers(self, condition: Condition) -> NDArray[np.bool_]:
        """``(values + 1,)`` bool: whether each value passes, and last whether a missing one does."""
        import numpy as np

        out = np.zeros(self._num_values + 1, dtype=np.bool_)
        operator, operand = condition.operator, condition.operand
        if operator == "$exists":
            out[:-1] = bool(operand)
        elif isinstance(operand, frozenset):
            negated = operator in ("$ne", "$nin")
            out[:-1] = negated
            out[[code for key in operand for code in self._codes[key]]] = not negated
        else:
            is_text = isinstance(operand, str)
            ranks = self._ranks[is_text]
            place = 2 * bisect_left(self._bounds[is_text], operand)
            if operator in ("$lt", "$lte"):
                out[:-1] = (ranks >= 0) & (ranks <= place + (operator == "$lte"))
            else:
                out[:-1] = ranks > place + (operator == "$gt")
        out[-1] = holds(condition, None)
        return out
