"""Metadata of every everyday type comes back as it was, and can be filtered on where it has an order."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections import OrderedDict, defaultdict
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import Enum, Flag, IntEnum
from fractions import Fraction
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding

from rag_pipeline.langchain import FaissVectorStore, RagRetriever
from rag_pipeline.langchain.documents import document_id, to_chunk, to_document
from rag_pipeline.langchain.metadata import join_metadata, split_metadata
from retrievers import RetrievalError

EMBEDDING = DeterministicFakeEmbedding(size=16)


class Colour(Enum):
    RED = "red"


class Level(IntEnum):
    HIGH = 3


class Word(str, Enum):  # noqa: UP042 (older code has these)
    YES = "yes"


class Right(Flag):
    READ = 1
    WRITE = 2


METADATA: dict[Any, Any] = {
    "source": "a.txt",
    "page": 3,
    "score": 0.5,
    "draft": False,
    "title": "T",
    "path": "p/q.txt",
    "document_id": "mine",
    "langchain_json": "mine too",
    "$odd": 1,
    7: "a number as a name",
    "tags": ["a", {"b": None}],
    "nothing": None,
    "nested": {"x": [1.5], 1: "one", "$type": "mine", "at": date(2026, 11, 28)},
    "date": date(2026, 11, 28),
    "naive": datetime(2026, 11, 28, 9, 30, 0, 5),
    "utc": datetime(2026, 11, 28, 9, 30, tzinfo=UTC),
    "offset": datetime(2026, 11, 28, 9, 30, tzinfo=timezone(timedelta(hours=-3))),
    "zone": datetime(2026, 10, 25, 2, 30, fold=1, tzinfo=ZoneInfo("Europe/Berlin")),
    "time": time(9, 30),
    "span": timedelta(days=1, microseconds=1),
    "tuple": (1, "a"),
    "set": {1, 2},
    "frozen": frozenset("ab"),
    "bytes": b"\x00\xff",
    "decimal": Decimal("0.10"),
    "fraction": Fraction(1, 3),
    "complex": 1 + 2j,
    "uuid": UUID(int=5),
    "file": Path("a/b.txt"),
    "posix": PurePosixPath("/x"),
    "windows": PureWindowsPath(r"C:\x"),
    "enum": Colour.RED,
    "int_enum": Level.HIGH,
    "str_enum": Word.YES,
    "flags": Right.READ | Right.WRITE,
    "int64": np.int64(2**60),
    "float32": np.float32(0.1),
    "bool_": np.bool_(True),
    "str_": np.str_("text"),
    "datetime64": np.datetime64("2026-11-28T09:30"),
    "timedelta64": np.timedelta64(5, "m"),
    "infinite": math.inf,
    "huge": 10**30,
    "surrogate": "half \ud83d",
    "ordered": OrderedDict(a=1),
    "default": defaultdict(int, a=1),
}


@pytest.mark.parametrize(
    "metadata",
    [METADATA, {}, {"title": "", "path": ""}, {"title": 5, "path": Path("x")}, {"title": Word.YES}],
)
def test_no_metadata_is_lost(metadata: dict[str, Any]) -> None:
    document = Document(page_content="text", metadata=metadata, id="i")
    assert to_document(to_chunk(document)) == document
    store = FaissVectorStore(EMBEDDING)
    store.add_documents([document])
    (found,) = store.similarity_search("x")
    assert found == document
    for key, value in found.metadata.items():
        if not isinstance(metadata[key], np.generic | OrderedDict | defaultdict):
            assert type(value) is type(metadata[key]), key


def test_what_is_equal_to_nothing_and_arrays_come_back_too() -> None:
    given = {"nan": math.nan, "array": np.arange(6, dtype="<i2").reshape(2, 3), "z": datetime.max}
    found = join_metadata(split_metadata(given, "i"))
    assert math.isnan(found["nan"])
    assert found["z"] == datetime.max
    np.testing.assert_array_equal(found["array"], given["array"])
    assert found["array"].dtype == given["array"].dtype


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
    | st.binary() | st.dates() | st.datetimes() | st.decimals(allow_nan=False) | st.uuids(),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text(max_size=6) | st.integers(), inner, max_size=3)
    | st.tuples(inner, inner),
    max_leaves=8,
)  # fmt: skip


@given(st.dictionaries(st.text(max_size=8), JSON, max_size=4))
def test_any_metadata_comes_back_and_can_be_written(metadata: dict[str, Any]) -> None:
    columns = split_metadata(metadata, "i")
    json.dumps(columns, ensure_ascii=False, allow_nan=False).encode()
    assert join_metadata(json.loads(json.dumps(columns))) == metadata


def test_dates_and_the_like_can_be_filtered_on() -> None:
    store = FaissVectorStore(EMBEDDING)
    store.add_texts(
        list("abc"),
        [{"day": date(2026, 1, n), "price": Decimal(n), "who": UUID(int=n), "c": c}
         for n, c in ((1, Colour.RED), (2, None), (3, None))],
        ids=list("abc"),
    )  # fmt: skip

    def ids(where: dict[str, Any]) -> set[str | None]:
        return {document.id for document in store.similarity_search("x", filter=where)}

    assert ids({"day": {"$gte": date(2026, 1, 2)}}) == {"b", "c"}
    assert ids({"day": {"$lt": datetime(2026, 1, 2, 5)}}) == {"a", "b"}
    assert ids({"price": [Decimal(1), np.int64(3)]}) == {"a", "c"}
    assert ids({"$or": [{"who": UUID(int=2)}, {"c": Colour.RED}]}) == {"a", "b"}
    assert ids({}) == {"a", "b", "c"}
    retriever = RagRetriever.from_index(store.index_dir, embedding=EMBEDDING, mode="dense")
    assert [d.id for d in retriever.invoke("x", where={"c": Colour.RED})] == ["a"]


@pytest.mark.parametrize("value", [object(), [object()], {"deep": {1: object()}}, iter("x")])
def test_metadata_that_cannot_be_given_back_is_refused_and_nothing_is_written(value: Any) -> None:
    store = FaissVectorStore(EMBEDDING)
    with pytest.raises(RetrievalError, match="metadata of document 'i' cannot be stored") as error:
        store.add_documents([Document(page_content="t", metadata={"f": value}, id="i")])
    assert "'f': a " in str(error.value)
    assert "\n" not in str(error.value)
    assert len(store) == 0


def test_an_enumeration_is_never_imported_to_read_it() -> None:
    """An index is data: a module that it names is looked up, never loaded."""
    columns = split_metadata({"enum": Colour.RED}, "i")
    text = str(columns["langchain_json"]).replace(__name__, "this")
    code = (
        "import sys, json\n"
        "from rag_pipeline.langchain.metadata import join_metadata\n"
        "found = join_metadata({'enum': 'red', 'langchain_json': sys.argv[1]})\n"
        "assert found == {'enum': 'red'}, found\n"
        "assert 'this' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code, text], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_id_of_a_document_without_one_is_the_same_in_every_process() -> None:
    """Documents of any retriever are laid out, whatever their metadata holds."""
    loop: dict[str, Any] = {}
    loop["self"] = loop
    for metadata in ({"f": object()}, loop, {(1, 2): "x"}, METADATA):
        first, second = (Document(page_content="t", metadata=dict(metadata)) for _ in "12")
        assert document_id(first) == document_id(second)
    other = {"f": object()}
    assert document_id(Document(page_content="t", metadata={"f": object()})) == document_id(
        Document(page_content="t", metadata=other)
    )
