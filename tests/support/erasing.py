"""Texts that are deleted and kept, and an index of them: vectors are drawn from the text's hash."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np

from chunk_cache import KVContext, StoreFolder
from retrievers import (
    Chunk,
    Document,
    HFTokenizer,
    ingest,
)

SECRET = "The code of the old vault in the cellar of the town hall is 4711 and nobody knows it."
SHARED = "Every report of this town ends with the same line about the weather of the last week."
OTHER = "The lighthouse was painted green in the spring of 1931 by its keeper and his two sons."
CONTEXT = KVContext(
    model_fingerprint="m", dtype="float32", kv_dtype="float32", rope="{}", prefix_digest="p"
)


class HashEmbedder:
    """Unit vectors drawn from the text's hash."""

    name, dim, fingerprint = "hash", 4, "a" * 32

    def encode_documents(self, texts: list[str], **options: object) -> np.ndarray:
        rows = [np.random.default_rng(abs(hash(text))).normal(size=self.dim) for text in texts]
        out = np.array(rows, dtype=np.float32)
        return out / np.linalg.norm(out, axis=1, keepdims=True)

    def encode_query(self, text: str) -> np.ndarray:
        return self.encode_documents([text])[0]


class LineSplitter:
    """One chunk a line."""

    def __init__(self) -> None:
        self.settings = {"kind": "line"}
        self.tokenizer = SimpleNamespace(fingerprint="characters")

    def split(self, document: Document) -> list[Chunk]:
        return [
            Chunk(
                id=f"{document.id}#{number}",
                document_id=document.id,
                text=line,
                title=document.title,
                start=0,
                end=len(line),
                num_tokens=len(line),
                path=None,
                metadata={},
            )
            for number, line in enumerate(document.text.split("\n"))
        ]


def put(index: Path, documents: dict[str, str], **options: object) -> None:
    found = [
        Document(id=name, title=name, text=text, path=None, metadata={})
        for name, text in documents.items()
    ]
    ingest(found, index, splitter=LineSplitter(), embedder=HashEmbedder(), **options)


def texts(folder: StoreFolder, model: Path) -> set[str]:
    tokenizer = HFTokenizer(model)
    found = (folder.token_ids(key) for key in folder.keys())  # noqa: SIM118
    return {tokenizer.decode(ids.tolist()) for ids in found if ids is not None}


def bytes_below(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
