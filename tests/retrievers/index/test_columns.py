"""Columns on disk: what fields of their own cost, and indexes of earlier versions."""

from __future__ import annotations

import json
import random
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from retrievers import CorruptIndexError, Filter
from retrievers.columns import Columns, ColumnWriter
from retrievers.types import Scalar

Rows = list[dict[str, Scalar]]


def columns_of(rows: Rows, folder: Path, step: int = 50) -> Columns:
    folder.mkdir(exist_ok=True)
    writer = ColumnWriter(folder)
    for start in range(0, len(rows), step):
        writer.append(rows[start : start + step])
    writer.write()
    return Columns(folder, len(rows))


def test_fields_of_their_own_cost_what_their_values_do(tmp_path: Path) -> None:
    """300 rows with 40 fields each that no other row has: 3.6 million codes as dense columns."""
    rows: Rows = [{f"f{row}-{n}": n for n in range(40)} | {"all": row} for row in range(300)]
    tracemalloc.start()
    try:
        columns = columns_of(rows, tmp_path, step=300)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    num_values = 41 * 300
    assert sum(path.stat().st_size for path in tmp_path.glob("*.i32")) <= 8 * num_values
    assert peak < 800 * num_values
    assert len(columns.names()) == 40 * 300 + 1
    for name, row in (("f7-3", 7), ("f299-39", 299), ("f0-0", 0)):
        assert np.flatnonzero(Filter({name: {"$exists": True}}).mask(columns)).tolist() == [row]
        assert np.flatnonzero(Filter({name: rows[row][name]}).mask(columns)).tolist() == [row]


def test_frequent_and_rare_fields_read_as_they_were_written(tmp_path: Path) -> None:
    draw = random.Random(0)
    shares = {"always": 1.0, "often": 0.7, "half": 0.5, "rare": 0.1, "once": 0.01}
    pool: list[Scalar] = [1, 1.5, True, False, "1", "x"]
    rows: Rows = [
        {name: draw.choice(pool) for name, share in shares.items() if draw.random() < share}
        for _ in range(333)
    ]
    columns = columns_of(rows, tmp_path)
    assert (tmp_path / "columns.pairs.i32").exists()
    assert not (tmp_path / "columns.spill").exists()
    for name in shares:
        values, codes = columns.column(name)
        got = [None if code < 0 else (type(values[code]), values[code]) for code in codes]
        expected = [(type(row[name]), row[name]) if name in row else None for row in rows]
        assert got == expected


def test_fields_that_all_carry_are_written_as_by_earlier_versions(tmp_path: Path) -> None:
    """And those open: a code for every row and field, -1 for none, however few carry it."""
    rows: Rows = [{"a": "x", "b": row} for row in range(3)]
    columns_of(rows, tmp_path / "new")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "columns.i32", "columns.json",
    ]  # fmt: skip
    old = tmp_path / "old"
    old.mkdir()
    body = {"num_rows": 3, "values": {"a": ["x"], "b": [7], "c": [0, 1]}}
    (old / "columns.json").write_text(json.dumps(body))
    np.array([[0, 0, 0], [-1, -1, 0], [1, 0, -1]], dtype="<i4").tofile(old / "columns.i32")
    columns = Columns(old, 3)
    assert Filter({"b": 7}).mask(columns).tolist() == [False, False, True]
    assert Filter({"c": 1}).mask(columns).tolist() == [True, False, False]
    assert Filter({"a": "x"}).mask(columns).all()


@pytest.mark.parametrize("name", ["columns.i32", "columns.pairs.i32", "columns.json"])
def test_a_file_that_is_cut_off_is_refused(name: str, tmp_path: Path) -> None:
    columns_of([{"a": 1, "b": 2}, {"a": 1}, {"a": 3}], tmp_path)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CorruptIndexError):
        Columns(tmp_path, 3)
