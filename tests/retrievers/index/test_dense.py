from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from retrievers import CorruptIndexError, DenseIndex, RetrievalError, choose_factory
from retrievers.dense import exact_search, top_k

DIM = 32
REMOVING = ["Flat", "IDMap2,Flat", "IVF8,Flat", "IVF8,SQ8", "SQfp16", "PCA16,IVF8,Flat"]
GRAPHS = ["HNSW16", "HNSW16,SQ8"]
COMPRESSED = ["OPQ1,IVF8,PQ8x4", "IVF8_HNSW8,PQ8x4fs", "IVF8,Flat,RFlat", "PQ8x4fs,RFlat"]


def unit(rng: np.random.Generator, rows: int) -> np.ndarray:
    vectors = rng.normal(size=(rows, DIM)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture
def data() -> tuple[np.ndarray, np.ndarray]:
    vectors = unit(np.random.default_rng(0), 500)
    return vectors, np.arange(500, dtype=np.int64) * 7 + 3


def brute_force(vectors: np.ndarray, labels: np.ndarray, query: np.ndarray, k: int) -> list[int]:
    return labels[np.argsort(-(vectors @ query), kind="stable")[:k]].tolist()


def test_flat_equals_numpy(data: tuple[np.ndarray, np.ndarray]) -> None:
    vectors, labels = data
    index = DenseIndex.build(vectors, labels)
    queries = unit(np.random.default_rng(1), 20)
    found, scores = index.search(queries, 10)
    for query, row, values in zip(queries, found, scores, strict=True):
        assert row.tolist() == brute_force(vectors, labels, query, 10)
        np.testing.assert_allclose(values, np.sort(vectors @ query)[::-1][:10], atol=1e-5)


@pytest.mark.parametrize("factory", REMOVING + GRAPHS + COMPRESSED)
def test_save_load_search(
    factory: str, data: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    vectors, labels = data
    index = DenseIndex.build(vectors, labels, factory)
    index.save(tmp_path / "x.faiss")
    queries = unit(np.random.default_rng(2), 5)
    expected = index.search(queries, 10)
    for mmap in (True, False):
        again = DenseIndex.load(tmp_path / "x.faiss", factory, mmap=mmap)
        for left, right in zip(expected, again.search(queries, 10), strict=True):
            np.testing.assert_array_equal(left, right)
    assert set(expected[0].ravel().tolist()) <= {-1, *labels.tolist()}


@pytest.mark.parametrize("factory", REMOVING)
def test_remove_and_upsert(factory: str, data: tuple[np.ndarray, np.ndarray]) -> None:
    vectors, labels = data
    index = DenseIndex.build(vectors, labels, factory)
    assert index.can_remove
    assert index.remove(labels[:100]) == 100
    assert index.remove(labels[:100]) == 0
    found, _ = index.search(vectors[:20], 5)
    assert not set(found.ravel().tolist()) & set(labels[:100].tolist())
    index.upsert(labels[100:110], vectors[:10])
    assert len(index) == 400
    found, _ = index.search(vectors[:10], 1)
    # Compressed vectors may tie with a neighbour; these keep at least a byte a dimension.
    assert found[:, 0].tolist() == labels[100:110].tolist()


@pytest.mark.parametrize("factory", GRAPHS)
def test_graph_refuses_to_remove(factory: str, data: tuple[np.ndarray, np.ndarray]) -> None:
    vectors, labels = data
    index = DenseIndex.build(vectors, labels, factory)
    assert not index.can_remove
    with pytest.raises(RetrievalError, match=r"cannot delete.*IDMap2,Flat"):
        index.remove(labels[:1])
    index.add(np.array([9999]), vectors[:1])
    assert len(index) == 501


@pytest.mark.parametrize("factory", ["Flat", "IVF8,Flat", "HNSW16", "PCA16,IVF8,Flat", "IVF8,SQ8"])
@pytest.mark.parametrize("step", [2, 40])
def test_selector(factory: str, step: int, data: tuple[np.ndarray, np.ndarray]) -> None:
    vectors, labels = data
    index = DenseIndex.build(vectors, labels, factory)
    assert index.can_filter
    allowed = labels[::step]
    found, _ = index.search(vectors[:5], 5, allowed=allowed)
    assert set(found.ravel().tolist()) - {-1} <= set(allowed.tolist())
    assert (found[:, 0] >= 0).all()
    if factory == "Flat":
        for query, row in zip(vectors[:5], found, strict=True):
            assert row.tolist() == brute_force(vectors[::step], allowed, query, 5)


def test_refining_index_says_it_cannot_filter(data: tuple[np.ndarray, np.ndarray]) -> None:
    assert not DenseIndex.build(*data, "IVF8,Flat,RFlat").can_filter


def test_exact_search(data: tuple[np.ndarray, np.ndarray]) -> None:
    vectors, _ = data
    rows = np.arange(10, 400, 3)
    found, scores = exact_search(vectors, rows, vectors[13], 4)
    assert found.tolist() == brute_force(vectors[rows], rows, vectors[13], 4)
    assert scores[0] == pytest.approx(1, abs=1e-6)


def test_top_k_breaks_ties_by_position() -> None:
    scores = np.array([1, 3, 2, 3, 2, 2], dtype=np.float32)
    assert top_k(scores, 4).tolist() == [1, 3, 2, 4]
    assert top_k(scores, 99).tolist() == [1, 3, 2, 4, 5, 0]


def test_too_few_vectors_to_train(data: tuple[np.ndarray, np.ndarray]) -> None:
    with pytest.raises(RetrievalError, match=r"at least 1024 vectors.*has 500"):
        DenseIndex.build(*data, "IVF1024,Flat")


# 256 centroids on 500 vectors take FAISS 1.5 s a table: hence a single one of that size.
@pytest.mark.parametrize(
    ("factory", "centroids"), [("IVF64,PQ8x4", 64), ("PQ8x6", 64), ("OPQ1,IVF16,PQ8x4", 256)]
)
def test_one_training_warning(
    factory: str,
    centroids: int,
    data: tuple[np.ndarray, np.ndarray],
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    with caplog.at_level(logging.WARNING):
        DenseIndex.build(*data, factory)
    assert len(caplog.records) == 1
    assert f"{centroids} centroids on 500 vectors" in caplog.text
    captured = capfd.readouterr()
    assert "WARNING clustering" not in captured.err + captured.out


@pytest.mark.parametrize("factory", ["Bogus3", "", "Flat; rm", "LSH", "IMI2x4,PQ8"])
def test_bad_factory_is_one_line(factory: str) -> None:
    with pytest.raises(RetrievalError) as caught:
        DenseIndex.build(np.zeros((0, DIM), np.float32), np.zeros(0, np.int64), factory)
    assert "\n" not in str(caught.value)
    assert "try 'IDMap2,Flat'" in str(caught.value)


def test_search_options(data: tuple[np.ndarray, np.ndarray], tmp_path: Path) -> None:
    vectors, labels = data
    path = tmp_path / "x"
    DenseIndex.build(vectors, labels, "IVF16,Flat").save(path)
    queries = unit(np.random.default_rng(3), 50)
    narrow, _ = DenseIndex.load(path, "IVF16,Flat").search(queries, 10)
    wide, _ = DenseIndex.load(path, "IVF16,Flat", options="nprobe=16").search(queries, 10)
    exact = [brute_force(vectors, labels, query, 10) for query in queries]
    assert wide.tolist() == exact
    assert narrow.tolist() != exact
    with pytest.raises(RetrievalError, match="efSearch=64"):
        DenseIndex.load(path, "IVF16,Flat", options="bogus=1")


def test_bad_queries(data: tuple[np.ndarray, np.ndarray], tmp_path: Path) -> None:
    index = DenseIndex.build(*data)
    with pytest.raises(RetrievalError, match="32 dimensions"):
        index.search(np.zeros((1, 5), np.float32), 1)
    with pytest.raises(RetrievalError, match="k must be"):
        index.search(np.zeros((1, DIM), np.float32), 0)
    (tmp_path / "bad").write_bytes(b"nothing")
    with pytest.raises(CorruptIndexError, match="not a readable FAISS index"):
        DenseIndex.load(tmp_path / "bad", "Flat")


def test_auto_factory() -> None:
    assert choose_factory(0).factory == "IDMap2,Flat"
    assert choose_factory(20_000).factory == "IDMap2,Flat"
    large = choose_factory(100_000)
    assert large.factory.startswith("IVF")
    assert "nprobe=" in large.search_options
