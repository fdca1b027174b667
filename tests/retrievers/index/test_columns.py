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


@pytest.mark.parametrize("seed", range(5))
def test_copied_rows_read_as_written_anew_and_bring_no_value_of_a_row_that_is_gone(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("retrievers.columns._BLOCK", 50)
    draw = random.Random(seed)
    pool: list[Scalar] = [1, 1.0, 1.5, True, False, 0, "1", "x", ""]

    def row(number: int) -> dict[str, Scalar]:
        shares = {"often": 0.7, "rare": 0.1, "once": 0.01}
        fields = {name: draw.choice(pool) for name, p in shares.items() if draw.random() < p}
        return {"document_id": f"doc {number // 2}", f"own {number}": number} | fields

    rows: Rows = [row(number) for number in range(300)]
    kept = np.array(sorted(draw.sample(range(300), (0, 1, 150, 299, 300)[seed])), dtype=np.int64)
    old = columns_of(rows, tmp_path / "old")
    (tmp_path / "new").mkdir()
    writer = ColumnWriter(tmp_path / "new")
    writer.copy(old, kept)
    added: Rows = [row(number) for number in range(300, 320)]
    writer.append(added)
    writer.write()
    expected: Rows = [*(rows[number] for number in kept.tolist()), *added]
    copied = Columns(tmp_path / "new", len(expected))
    anew = columns_of(expected, tmp_path / "anew")
    assert copied.is_current
    assert copied.names() == anew.names() == {name for fields in expected for name in fields}
    for name in anew.names():
        read = []
        for columns in (copied, anew):
            values, codes = columns.column(name)
            assert set(range(len(values))) == set(codes[codes >= 0].tolist())
            read.append([(type(values[c]), values[c]) if c >= 0 else None for c in codes])
        assert read[0] == read[1]


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
    assert not columns.is_current  # the next ingest makes them anew
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
