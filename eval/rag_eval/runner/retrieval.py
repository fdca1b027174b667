"""Retrieval inside a run: chunks from an index instead of the data set's own contexts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rag_eval.datasets import Encode, Example, PromptChunk
from rag_eval.metrics import retrieval_scores

if TYPE_CHECKING:
    from retrievers import Index


class IndexedChunks:
    """Chunks of an index, as they stand in prompts.

    Parameters
    ----------
    folder : Path
        Index folder; its own embedder encodes the questions.
    encode : Encode
        Tokeniser of the model under test.
    """

    def __init__(self, folder: Path, encode: Encode) -> None:
        from rag_pipeline import resolve_embedder
        from retrievers import Embedder, Index, Manifest

        name = Manifest.read(folder).embedder_name
        embedder = Embedder(resolve_embedder(name).path, name=name)
        self._index: Index = Index.open(folder, embedder=embedder)
        self._retriever = self._index.retriever("hybrid")
        self._encode = encode

    def chunks(self, example: Example, count: int) -> list[PromptChunk]:
        """Best `count` chunks for the question, best first."""
        gold = gold_titles(example)
        found = []
        for hit in self._retriever.search(example.question, k=count):
            title, text = hit.chunk.title, hit.chunk.text.strip()
            body = f"{title}\n{text}" if title else text
            found.append(
                PromptChunk(
                    ids=(*self._encode(body), *self._encode("\n\n")),
                    titles=(title,),
                    is_gold=title in gold,
                )
            )
        return found

    def close(self) -> None:
        """Close the index."""
        self._index.close()


def gold_titles(example: Example) -> set[str]:
    """Titles of the passages that a data set marks as needed."""
    return {passage.title for passage in example.passages if passage.is_gold and passage.title}


def score_retrieval(
    examples: Sequence[Example], records: Sequence[Mapping[str, Any]], *, k: int
) -> dict[str, Any]:
    """Recall and nDCG of the titles retrieved, over the examples that name gold titles.

    Returns
    -------
    dict
        Empty where no example names one; else also ``n``, the examples scored.
    """
    gold = {example.id: sorted(titles) for example in examples if (titles := gold_titles(example))}
    if not gold:
        return {}
    ranked = {
        record["id"]: [title for titles in record["titles"] for title in titles]
        for record in records
        if record["id"] in gold
    }
    return {**retrieval_scores(gold, ranked, k=k), "n": len(gold)}
