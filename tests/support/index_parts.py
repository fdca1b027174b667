"""Documents of three lines, and parts of an index that is written by hand."""

from __future__ import annotations

from retrievers import Chunk, Document, IndexSettings

DOCUMENTS = [
    Document(
        id=f"d{i}",
        text=f"alpha {i}\nbeta {i} common words\ngamma {i}",
        title=f"Title {i}",
        path=f"folder/{i}.txt",
        metadata={"year": 2000 + i, "even": i % 2 == 0},
    )
    for i in range(20)
]


def settings_for(dim: int) -> IndexSettings:
    return IndexSettings(
        embedder_name="hash",
        embedder_fingerprint="a" * 32,
        dim=dim,
        splitter={},
        tokenizer_fingerprint="t",
    )


def make_chunk(document: str, number: int, text: str) -> Chunk:
    return Chunk(
        id=f"{document}#{number}",
        document_id=document,
        text=text,
        title=document,
        start=0,
        end=len(text),
        num_tokens=1,
        metadata={"n": number},
    )
