from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from enum import IntEnum, StrEnum
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from retrievers import Filter, RetrievalError
from retrievers.columns import Columns, ColumnWriter
from retrievers.types import Scalar

ROWS: list[dict[str, Scalar]] = [
    {"lang": "en", "year": 2019, "draft": False},
    {"lang": "de", "year": 2021, "draft": True},
    {"lang": "en", "year": 2023.5},
    {"lang": "fr", "one": 1, "draft": False},
    {"lang": "en", "one": True, "year": 1},
]


def columns_of(rows: list[dict[str, Scalar]], folder: Path) -> Columns:
    writer = ColumnWriter(folder)
    writer.append(rows[:2])
    writer.append(rows[2:])
    writer.write()
    return Columns(folder, len(rows))


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ({"lang": "en"}, [0, 2, 4]),
        ({"lang": ["de", "fr"]}, [1, 3]),
        ({"lang": {"$nin": ["de", "fr"]}}, [0, 2, 4]),
        ({"year": {"$gte": 2019, "$lt": 2023}}, [0, 1]),
        ({"year": {"$gt": 2021}}, [2]),
        ({"year": {"$ne": 2019}}, [1, 2, 3, 4]),
        ({"year": {"$exists": False}}, [3]),
        ({"lang": "en", "year": {"$lte": 2019}}, [0, 4]),
        ({"$or": [{"lang": "de"}, {"year": 1}]}, [1, 4]),
        ({"$not": {"lang": "en"}}, [1, 3]),
        ({"$and": [{"$not": {"draft": True}}, {"lang": ["en", "de"]}]}, [0, 2, 4]),
        ({"one": 1}, [3]),
        ({"one": True}, [4]),
        ({"lang": {"$gt": "de"}}, [0, 2, 3, 4]),
        ({"year": {"$gt": "2000"}}, []),
        ({"lang": []}, []),
    ],
)
def test_meaning(where: dict[str, object], expected: list[int], tmp_path: Path) -> None:
    columns = columns_of(ROWS, tmp_path)
    assert np.flatnonzero(Filter(where).mask(columns)).tolist() == expected
    assert [i for i, row in enumerate(ROWS) if Filter(where).matches(row)] == expected


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({}, "must not be empty"),
        ({"a": {"$regex": "x"}}, r"\$regex.*\$eq"),
        ({"$xor": []}, r"\$xor.*\$and"),
        ({"$or": []}, "at least one"),
        ({"a": {"$in": "text"}}, "needs a list"),
        ({"a": None}, "needs text"),
        ({"a": float("nan")}, "needs text"),
        ({"a": {"$gt": True}}, "number or text"),
        ({"a": {"$exists": 1}}, "true or false"),
        ({"a": {}}, "is empty"),
        ("a", "must be a mapping"),
        ({"$not": [1]}, "must be a mapping"),
    ],
)
def test_refused(where: object, message: str) -> None:
    with pytest.raises(RetrievalError, match=message) as caught:
        Filter(where)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_misspelt_field_names_the_fields(tmp_path: Path) -> None:
    with pytest.raises(RetrievalError, match=r"'langg'.*draft, lang, one, year"):
        Filter({"langg": "en"}).mask(columns_of(ROWS, tmp_path))


scalars = st.one_of(
    st.integers(-3, 3), st.booleans(), st.sampled_from(["a", "b"]), st.floats(-2, 2)
)
rows_strategy = st.lists(
    st.dictionaries(st.sampled_from(["x", "y"]), scalars, max_size=2), min_size=2, max_size=12
)
leaf = st.one_of(
    st.builds(lambda f, v: {f: v}, st.sampled_from(["x", "y"]), scalars),
    st.builds(
        lambda f, o, v: {f: {o: v}},
        st.sampled_from(["x", "y"]),
        st.sampled_from(["$eq", "$ne"]),
        scalars,
    ),
    st.builds(
        lambda f, o, v: {f: {o: v}},
        st.sampled_from(["x", "y"]),
        st.sampled_from(["$gt", "$gte", "$lt", "$lte"]),
        st.one_of(st.integers(-3, 3), st.sampled_from(["a", "b"])),
    ),
    st.builds(
        lambda f, o, v: {f: {o: v}},
        st.sampled_from(["x", "y"]),
        st.sampled_from(["$in", "$nin"]),
        st.lists(scalars, max_size=3),
    ),
)
wheres = st.recursive(
    leaf,
    lambda inner: st.one_of(
        st.builds(lambda w: {"$not": w}, inner),
        st.builds(
            lambda k, ws: {k: ws},
            st.sampled_from(["$and", "$or"]),
            st.lists(inner, min_size=1, max_size=3),
        ),
    ),
    max_leaves=6,
)


@given(rows=rows_strategy, where=wheres)
def test_columns_agree_with_single_rows(
    rows: list[dict[str, Scalar]],
    where: dict[str, object],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    rows = [*rows, {"x": 0, "y": 0}]  # every field is carried by some row
    mask = Filter(where).mask(columns_of(rows, tmp_path_factory.mktemp("columns")))
    assert mask.tolist() == [Filter(where).matches(row) for row in rows]


class Seen(int):
    """An integer that counts how often it is compared."""

    comparisons = 0
    __hash__ = int.__hash__

    def __eq__(self, other: object) -> bool:
        Seen.comparisons += 1
        return int.__eq__(self, other) is True


class Passes(list[Scalar]):
    """Values of a column that count how often they are gone through."""

    number = 0

    def __iter__(self) -> Iterator[Scalar]:
        self.number += 1
        return super().__iter__()


class OneColumn:
    """A column `x` of many distinct values, a row each."""

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self.values = Passes(range(num_rows))

    def names(self) -> list[str]:
        return ["x"]

    def column(self, name: str) -> tuple[Passes, NDArray[np.int32]]:
        return self.values, np.arange(self.num_rows, dtype=np.int32)


@pytest.mark.parametrize("operator", ["$in", "$nin"])
def test_a_long_list_is_looked_up_and_not_gone_through_for_each_value(operator: str) -> None:
    Seen.comparisons = 0
    wanted = [Seen(2 * number) for number in range(300)]
    mask = Filter({"x": {operator: wanted}}).mask(OneColumn(1000))
    assert np.flatnonzero(mask == (operator == "$in")).tolist() == list(range(0, 600, 2))
    # Once each where it is read; else a product of both lengths.
    assert Seen.comparisons <= 2 * len(wanted)


def test_many_conditions_on_a_field_go_through_its_values_once_and_keep_one_mask() -> None:
    columns = OneColumn(100_000)
    parts = [{"x": number} for number in range(300)] + [{"x": {"$gt": 99_990 - n}} for n in (0, 3)]
    where = Filter({"$or": parts})
    tracemalloc.start()
    try:
        mask = where.mask(columns)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert np.flatnonzero(mask).tolist() == [*range(300), *range(99_988, 100_000)]
    assert columns.values.number == 1
    assert peak < 50 * columns.num_rows


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"$or": [{"x": 1}] * 1001}, "more than 1000 conditions; give the values of one field"),
        ({"x": {"$in": list(range(100_001))}}, "more than 100000 values"),
        ({"$and": [{"x": list(range(60_000))}] * 2}, "more than 100000 values"),
        ({"$or": "x" * 100_000}, "needs a list of at least one filter"),
        ({"x": {"$in": "y" * 100_000}}, "needs a list"),
        ({"x" * 100_000: None}, "needs text, a number"),
    ],
)
def test_too_much_is_refused_in_a_short_line(where: dict[str, object], message: str) -> None:
    with pytest.raises(RetrievalError, match=message) as caught:
        Filter(where)
    assert len(str(caught.value)) < 250


def test_as_much_as_is_allowed_is_answered() -> None:
    columns = OneColumn(10)
    assert Filter({"$or": [{"x": 1}] * 1000}).mask(columns).sum() == 1
    assert Filter({"x": list(range(5, 100_005))}).mask(columns).sum() == 5


def test_a_member_of_an_enumeration_selects_what_it_equals() -> None:
    class Language(StrEnum):
        ENGLISH = "en"

    class Year(IntEnum):
        LAST = 2019

    assert Filter({"lang": Language.ENGLISH, "year": [Year.LAST]}).matches(ROWS[0])


def test_a_misspelt_field_names_some_of_very_many_fields(tmp_path: Path) -> None:
    columns = columns_of([{f"f{number:03}": 1 for number in range(300)}] * 3, tmp_path)
    with pytest.raises(RetrievalError, match=r"f000, .*f019 and 280 more$"):
        Filter({"g": 1}).mask(columns)
