"""Retriever and vector store: LangChain's standard suites, and what they do not look at."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.vectorstores import VectorStore
from langchain_tests.integration_tests import (
    RetrieversIntegrationTests,
    VectorStoreIntegrationTests,
)

from rag_pipeline.langchain import FaissVectorStore, RagEmbeddings, RagRetriever
from retrievers import EmbedderMismatchError, Index, RetrievalError

# The suites mix sync and async tests; asyncio's mark is meant for the latter only.
pytestmark = pytest.mark.filterwarnings("ignore:The test .* is marked with '@pytest.mark.asyncio'")

EMBEDDING = DeterministicFakeEmbedding(size=16)
TEXTS = [
    "A decorator is a function that takes a function and returns another one.",
    "The with statement enters and leaves a context manager.",
    "A generator yields its values one at a time.",
    "A lambda is a function without a name.",
    "A list comprehension builds a list from an iterable.",
]


@pytest.mark.asyncio
class TestFaissVectorStoreStandard(VectorStoreIntegrationTests):
    @pytest.fixture
    def vectorstore(self, tmp_path: Path) -> VectorStore:
        return FaissVectorStore(self.get_embeddings(), tmp_path / "index")


@pytest.fixture(scope="module")
def minilm(minilm_path: Path) -> RagEmbeddings:
    return RagEmbeddings.load("all-minilm-l6-v2")


@pytest.fixture(scope="module")
def index_dir(tmp_path_factory: pytest.TempPathFactory, minilm: RagEmbeddings) -> Path:
    folder = tmp_path_factory.mktemp("store") / "index"
    store = FaissVectorStore(minilm, folder)
    store.add_texts(TEXTS, [{"n": i, "even": i % 2 == 0} for i in range(len(TEXTS))])
    return folder


@pytest.mark.asyncio
class TestRagRetrieverStandard(RetrieversIntegrationTests):
    @pytest.fixture(autouse=True)
    def _index(self, index_dir: Path, minilm: RagEmbeddings) -> None:
        type(self).index = Index.open(index_dir, embedder=minilm.embedder)  # type: ignore[attr-defined]

    @property
    def retriever_constructor(self) -> type[RagRetriever]:
        return RagRetriever

    @property
    def retriever_constructor_params(self) -> dict[str, Any]:
        return {"retriever": type(self).index.retriever("dense")}  # type: ignore[attr-defined]

    @property
    def retriever_query_example(self) -> str:
        return "What is a function without a name?"


@pytest.mark.parametrize("mode", ["dense", "hybrid", "bm25"])
def test_the_retriever_finds_what_was_asked_for(index_dir: Path, mode: str) -> None:
    retriever = RagRetriever.from_index(index_dir, mode=mode, k=2)
    found = retriever.invoke("What is a lambda, a function without a name?")
    assert found[0].page_content == TEXTS[3]
    assert found[0].metadata["n"] == 3
    assert found[0].metadata["score"] >= found[1].metadata["score"]
    odd = retriever.invoke("function", where={"even": False}, k=5)
    assert {document.metadata["n"] for document in odd} <= {1, 3}
    with pytest.raises(RetrievalError, match="k is 0; it must be a whole number, at least 1"):
        retriever.invoke("x", k=0)


def test_the_store_survives_and_refuses_another_model(tmp_path: Path) -> None:
    folder = tmp_path / "index"
    first = FaissVectorStore.from_texts(TEXTS, EMBEDDING, ids=list("abcde"), index_dir=folder)
    again = FaissVectorStore(EMBEDDING, folder)
    assert len(again) == 5
    assert again.similarity_search(TEXTS[2], k=1)[0].id == "c"
    again.delete(["c"])
    assert [d.id for d in first.get_by_ids(["a", "c", "e"])] == ["a", "e"]
    with pytest.raises(EmbedderMismatchError):
        FaissVectorStore(DeterministicFakeEmbedding(size=8), folder)
    with pytest.raises(EmbedderMismatchError):
        FaissVectorStore(EMBEDDING, folder, embedding_id="another-model")
    again.delete()
    assert len(again) == 0
    assert again.similarity_search("x") == []
    again.add_texts(["back"], ids=["z"])
    assert [d.page_content for d in again.similarity_search("x")] == ["back"]


def test_filters_scores_and_mmr() -> None:
    store = FaissVectorStore(EMBEDDING)
    store.add_texts(TEXTS, [{"n": i} for i in range(5)], ids=list("abcde"))
    (best, cosine), *rest = store.similarity_search_with_score(TEXTS[0], k=5)
    assert best.id == "a"
    assert cosine == pytest.approx(1, abs=1e-5)
    assert all(score < cosine for _, score in rest)
    relevance = store.similarity_search_with_relevance_scores(TEXTS[0], k=5)
    assert [d.id for d, _ in relevance] == [best.id, *(d.id for d, _ in rest)]
    assert all(0 <= score <= 1 for _, score in relevance)
    assert {d.id for d in store.similarity_search("x", filter={"n": {"$gte": 3}})} == {"d", "e"}
    twice = FaissVectorStore.from_texts(["same", "same", "other"], EMBEDDING, ids=list("xyz"))
    near = twice.similarity_search("same", k=2)
    apart = twice.as_retriever(search_type="mmr", search_kwargs={"k": 2, "lambda_mult": 0.2})
    assert {d.page_content for d in near} == {"same"}
    assert {d.page_content for d in apart.invoke("same")} == {"same", "other"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.similarity_search("x", k=0), "k is 0"),
        (lambda s: s.similarity_search("x", kk=3), "has no option 'kk'"),
        (lambda s: s.add_texts(["a", "b"], ids=["1"]), "ids holds 1 entries for 2 texts"),
        (lambda s: s.add_texts(["a"], [{}, {}]), "metadatas holds 2 entries for 1 texts"),
        (lambda s: s.add_texts("one text"), "texts is 'one text'; give a list"),
        (lambda s: s.delete("x"), "ids is 'x'; give a list"),
        (lambda s: s.add_texts(["a"], ids=[1.5]), "an id is 1.5; give a text"),
        (lambda s: s.add_texts(["a"], batch_size=0), "batch_size is 0; it must be"),
        (lambda s: s.similarity_search_by_vector([1.0]), r"shape \(1,\)"),
        (lambda s: s.similarity_search_by_vector([0.0] * 16), "zero or not finite"),
    ],
)
def test_bad_input_is_one_line(call: Any, message: str) -> None:
    with pytest.raises(RetrievalError, match=message) as error:
        call(FaissVectorStore(EMBEDDING))
    assert "\n" not in str(error.value)


def test_a_chunk_of_an_ingested_document_is_not_torn_out(
    tmp_path: Path, minilm: RagEmbeddings, smollm2_path: Path
) -> None:
    from rag_pipeline import ModelTokenizer
    from retrievers import TokenSplitter, ingest
    from retrievers.types import Document as Source

    splitter = TokenSplitter(ModelTokenizer.load(smollm2_path), chunk_tokens=32)
    source = Source(id="doc", text=" ".join(TEXTS), title="Python")
    ingest([source], tmp_path / "i", splitter=splitter, embedder=minilm.embedder)
    store = FaissVectorStore(minilm, tmp_path / "i")
    assert len(store) > 1
    chunk = store.similarity_search("lambda", k=1)[0]
    assert chunk.metadata["title"] == "Python"
    with pytest.raises(RetrievalError, match="chunks of the document 'doc'"):
        store.delete([str(chunk.id)])
    before = len(store)
    store.add_texts(["A set holds each value once."], ids=["set"])
    assert len(store) == before + 1
    assert store.similarity_search("What is a set?", k=1)[0].id == "set"
    # What was added here does not stop the next ingest of the folder.
    report = ingest([source], tmp_path / "i", splitter=splitter, embedder=minilm.embedder)
    assert report.documents_unchanged == 1
    store.delete(["doc"])
    assert [d.id for d in store.similarity_search("x", k=9)] == ["set"]


def test_searches_go_on_while_documents_are_added() -> None:
    store = FaissVectorStore(EMBEDDING)
    store.add_texts(TEXTS, ids=list("abcde"))
    stop = threading.Event()
    seen: list[str | None] = []
    failed: list[BaseException] = []

    def search() -> None:
        try:
            while not stop.is_set():
                seen.append(store.similarity_search(TEXTS[0], k=1)[0].id)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=search) for _ in range(3)]
    for thread in threads:
        thread.start()
    for i in range(8):
        store.add_texts([f"more {i}"], ids=[f"m{i}"])
    stop.set()
    for thread in threads:
        thread.join()
    assert failed == []
    assert set(seen) == {"a"}
    assert len(store) == 13


def test_a_missing_extra_is_one_line_and_the_package_stays_light() -> None:
    code = (
        "import sys\n"
        "import rag_pipeline\n"
        "assert not {m.split('.')[0] for m in sys.modules} & {'langchain_core', 'torch', 'sglang'}\n"
        "sys.modules['langchain_openai'] = None\n"
        "import importlib.util as u\n"
        "found = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'langchain_openai' else found(name, *a)\n"
        "import rag_pipeline.langchain\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "ImportError: rag_pipeline.langchain needs langchain_openai, not installed here; "
        'run: pip install "rag-pipeline[langchain]"'
    )
    assert importlib.util.find_spec("langchain_openai") is not None
