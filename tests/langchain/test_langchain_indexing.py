"""LangChain's own indexing over our store, and views that stay fresh while others write."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, Literal
from uuid import UUID

import pytest
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.indexing import InMemoryRecordManager, aindex, index

from rag_pipeline.langchain import FaissVectorStore, RagRetriever
from retrievers import LiveIndex, RetrievalError

EMBEDDING = DeterministicFakeEmbedding(size=16)
DOCUMENTS = [
    Document(page_content="Coffee at nine.", metadata={"source": "1"}),
    Document(page_content="Tea at ten.", metadata={"source": "2"}),
    Document(page_content="Cake at four.", metadata={"source": "2"}),
]


def record_manager() -> InMemoryRecordManager:
    manager = InMemoryRecordManager("test")
    manager.create_schema()
    return manager


def contents(store: FaissVectorStore) -> set[str]:
    return {document.page_content for document in store.similarity_search("x", k=9)}


@pytest.mark.parametrize(
    ("cleanup", "left"),
    [
        ("full", {"Tea at noon."}),
        ("incremental", {"Coffee at nine.", "Tea at noon."}),
        ("scoped_full", {"Coffee at nine.", "Tea at noon."}),
        (None, {"Coffee at nine.", "Tea at ten.", "Cake at four.", "Tea at noon."}),
    ],
)
def test_index_keeps_the_store_as_the_sources_are(
    cleanup: Literal["full", "incremental", "scoped_full"] | None, left: set[str]
) -> None:
    store, manager = FaissVectorStore(EMBEDDING), record_manager()
    how: dict[str, Any] = {
        "cleanup": cleanup,
        "source_id_key": "source",
        "batch_size": 2,
        "key_encoder": "sha256",
    }
    assert index(DOCUMENTS, manager, store, **how)["num_added"] == 3
    index(DOCUMENTS, manager, store, force_update=True, **how)
    assert contents(store) == {document.page_content for document in DOCUMENTS}
    changed = [Document(page_content="Tea at noon.", metadata={"source": "2"})]
    index(changed, manager, store, **how)
    assert contents(store) == left
    asyncio.run(aindex([], manager, store, **how))
    assert contents(store) == (set() if cleanup == "full" else left)


def test_ids_are_given_as_langchain_and_its_users_give_them() -> None:
    store = FaissVectorStore(EMBEDDING)
    given = [Document(page_content="a", id="own"), Document(page_content="b", id="other")]
    assert store.add_documents(given, ids=[None, "b"]) == ["own", "b"]
    assert store.add_documents(iter(given), batch_size=1) == ["own", "other"]
    assert store.add_texts(iter("cd"), [None, {}], ids=(7, UUID(int=1))) == ["7", str(UUID(int=1))]
    found = {document.page_content for document in store.get_by_ids(["7", "other"])}
    assert found == {"c", "b"}
    assert store.delete({"7", "other"}) is True
    assert store.delete([]) is True
    assert len(store) == 3
    with pytest.raises(RetrievalError, match="has no option 'vector_field' here"):
        index(
            given,
            record_manager(),
            store,
            key_encoder="sha256",
            upsert_kwargs={"vector_field": "v"},
        )


def test_every_view_sees_what_another_object_wrote(tmp_path: Path) -> None:
    folder = tmp_path / "index"
    early, writer = FaissVectorStore(EMBEDDING, folder), FaissVectorStore(EMBEDDING, folder)
    writer.add_texts(["Coffee at nine."], ids=["x"])
    retrievers = [
        *(RagRetriever.from_index(folder, embedding=EMBEDDING, mode=m) for m in ("dense", "bm25")),
        early.as_retriever(),
    ]
    assert len(early) == 1
    assert [d.id for d in early.get_by_ids(["x"])] == ["x"]
    assert early.delete(["x"])
    assert len(writer) == 0
    assert [retriever.invoke("coffee tea") for retriever in retrievers] == [[], [], []]
    writer.add_texts(["Tea at ten."], ids=["y"])
    for retriever in retrievers:
        assert [d.id for d in retriever.invoke("coffee tea")] == ["y"]
    # A document of the same id that another object added is replaced, not doubled.
    early.add_texts(["Tea at noon."], ids=["y"])
    assert contents(writer) == {"Tea at noon."}


def test_a_folder_that_goes_and_comes_back_is_followed(tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "index"
    store = FaissVectorStore.from_texts(["one"], EMBEDDING, ids=["1"], index_dir=folder)
    retriever = RagRetriever.from_index(folder, embedding=EMBEDDING, mode="dense")
    live = LiveIndex(folder)
    opened = live.current()
    assert opened is not None
    assert live.current() is opened  # not opened again for nothing
    shutil.rmtree(folder)
    assert len(store) == 0
    assert store.delete(["1"]) is True
    assert live.current() is None
    with pytest.raises(RetrievalError, match="holds no index"):
        retriever.invoke("one")
    store.add_texts(["two"], ids=["2"])
    assert [d.page_content for d in retriever.invoke("one")] == ["two"]
