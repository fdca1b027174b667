from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

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
    writer = ColumnWriter()
    writer.append(rows[:2])
    writer.append(rows[2:])
    writer.write(folder)
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
