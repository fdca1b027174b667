"""Texts that are deleted and kept, and an index of them: vectors are drawn from the text's hash."""

from __future__ import annotations

from pathlib import Path

from chunk_cache import KVContext, StoreFolder
from rag_eval.reliability.instant_parts import HashEmbedder, LineSplitter
from retrievers import Document, HFTokenizer, ingest

SECRET = "The code of the old vault in the cellar of the town hall is 4711 and nobody knows it."
SHARED = "Every report of this town ends with the same line about the weather of the last week."
OTHER = "The lighthouse was painted green in the spring of 1931 by its keeper and his two sons."
CONTEXT = KVContext(
    model_fingerprint="m", dtype="float32", kv_dtype="float32", rope="{}", prefix_digest="p"
)


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
