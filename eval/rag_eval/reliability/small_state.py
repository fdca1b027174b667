"""A small index and a small chunk store whose every state is known: what they must hold, and what they must not.

Vectors are drawn from the text and KV from a number, so that a writer takes milliseconds and every byte can be
foretold; index, store and their files are the real ones.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np

from chunk_cache import ChunkKey, ChunkKV, KVContext, StoreFolder
from rag_eval.reliability.instant_parts import HashEmbedder, LineSplitter
from retrievers import Document, Index, delete_documents, ingest

DOCUMENTS = 6
TOKENS = 64
CONTEXT = KVContext(
    model_fingerprint="reliability",
    dtype="float32",
    kv_dtype="float32",
    rope="{}",
    prefix_digest="none",
)


def secret(state: int) -> str:
    """Text that the index holds in this state, if it is even, and in no later one."""
    return f"the vault of edition {state // 2} opens with seven turns"


def lines(state: int) -> frozenset[str]:
    """Texts of a state's chunks: an edition's documents, and in odd states all but the first of them."""
    return frozenset(
        line
        for document in _documents(state // 2)[state % 2 :]
        for line in document.text.split("\n")
    )


def advance(index: Path, state: int) -> None:
    """Bring the index to a state from the one before: an ingest where it is even, else a deletion."""
    if state % 2:
        delete_documents(index, ["d0"])
        return
    ingest(
        _documents(state // 2), index, splitter=LineSplitter(), embedder=HashEmbedder(), sync=True
    )


def texts(index: Path) -> frozenset[str]:
    """Texts of all chunks, every byte checked, each found under its document and by search."""
    with Index.open(index, verify=True) as opened:
        chunks = list(opened.chunks())
        known = {record.id for record in opened.documents()}
        if {chunk.document_id for chunk in chunks} != known:
            raise ValueError("chunks and documents of the index do not agree")
        hits = opened.retriever("bm25").search("note", k=len(chunks))
        if {hit.chunk.id for hit in hits} - {chunk.id for chunk in chunks} or not hits:
            raise ValueError("search finds other chunks than the index holds")
        return frozenset(chunk.text for chunk in chunks)


def leftovers(folder: Path) -> list[str]:
    """What belongs to no state: other generations, staged rows, files under a temporary name."""
    states = sorted(path.name for path in folder.rglob("gen-*"))[:-1]
    odd = [path.name for path in folder.rglob("*") if path.suffix in (".new", ".part", ".tmp")]
    return states + odd + [path.name for path in folder.rglob(".work/stage/*")]


def holds(folder: Path, text: str | bytes) -> list[Path]:
    """Files in which a text stands."""
    wanted, found = text.encode() if isinstance(text, str) else text, []
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # gone meanwhile
            if path.is_file() and wanted in path.read_bytes():
                found.append(path)
    return found


def record(number: int) -> ChunkKV:
    """Record number so much of the store."""
    import torch

    ids = np.arange(number * TOKENS + 1, (number + 1) * TOKENS + 1, dtype=np.int32)
    drawn = torch.Generator().manual_seed(number)
    k, v = (torch.randn((2, TOKENS, 2, 16), generator=drawn) for _ in range(2))
    key = ChunkKey.of(CONTEXT, ids)
    return ChunkKV(key=key, token_ids=ids, base_position=0, k=k, v=v)


def stored(folder: Path) -> tuple[set[int], list[str]]:
    """Numbers of the records that the store gives, each compared with what was put; and what was wrong."""
    import torch

    store, found, wrong = StoreFolder(folder), set(), []
    for key in store.keys():  # noqa: SIM118 - a store, not a mapping
        ids = store.token_ids(key)
        number = -1 if ids is None else (int(ids[0]) - 1) // TOKENS
        got = None if ids is None else store.get(key, ids)
        if got is None:
            wrong.append(f"record {key.digest[:12]} is damaged")
            continue
        meant = record(number)
        if not (torch.equal(got.k, meant.k) and torch.equal(got.v, meant.v)):
            wrong.append(f"record {number} holds wrong KV")
        found.add(number)
    return found, wrong


def _documents(edition: int) -> list[Document]:
    kept = [
        Document(
            id=f"d{number}",
            title=f"Note {number}",
            text=f"note {number} never changes\nnote {number} of edition {edition * (number % 2)}",
        )
        for number in range(1, DOCUMENTS)
    ]
    first = Document(id="d0", title="Vault", text=f"note on the vault\n{secret(2 * edition)}")
    return [first, *kept]
