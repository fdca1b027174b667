"""Retrieval inside a run, on a real index with the packaged embedder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rag_eval.datasets import Example, Passage
from rag_eval.runner.retrieval import IndexedChunks, gold_titles, score_retrieval

FACTS = {
    "Kestrel": "The kestrel is a small falcon that hovers in the wind while it hunts for voles.",
    "Granite": "Granite is a coarse-grained rock made of quartz, feldspar and mica.",
    "Sonnet": "A sonnet is a poem of fourteen lines with a fixed rhyme scheme.",
}


def example(name: str, question: str) -> Example:
    passages = tuple(
        Passage(title=title, text=text, is_gold=title == name) for title, text in FACTS.items()
    )
    return Example(id=name, question=question, answers=(name,), passages=passages)


EXAMPLES = [
    example("Kestrel", "Which falcon hovers in the wind?"),
    example("Granite", "Which rock is made of quartz and feldspar?"),
]


def encode(text: str) -> list[int]:
    return list(text.encode())


def test_scores_are_taken_over_gold_titles() -> None:
    records = [
        {"id": "Kestrel", "titles": [["Sonnet"], ["Kestrel"]]},
        {"id": "Granite", "titles": [["Sonnet"], ["Kestrel"]]},
    ]
    assert gold_titles(EXAMPLES[0]) == {"Kestrel"}
    scores = score_retrieval(EXAMPLES, records, k=2)
    assert scores["recall_at_k"] == 0.5
    assert scores["n"] == 2
    unmarked = Example(id="x", question="q", answers=("a",))
    assert score_retrieval([unmarked], [{"id": "x", "titles": []}], k=2) == {}


@pytest.mark.slow
def test_chunks_come_from_the_index(tmp_path: Path, minilm_path: Path, smollm2_path: Path) -> None:
    from rag_pipeline import ModelTokenizer
    from retrievers import Embedder, TokenSplitter, ingest, load_corpus

    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for title, text in FACTS.items():
        (corpus / f"{title}.md").write_text(f"# {title}\n\n{text}\n", "utf-8")
    index = tmp_path / "index"
    tokenizer = ModelTokenizer.load(smollm2_path)
    ingest(
        load_corpus([corpus]),
        index,
        splitter=TokenSplitter(tokenizer, chunk_tokens=64),
        embedder=Embedder(minilm_path, name="all-minilm-l6-v2"),
    )
    source = IndexedChunks(index, encode)
    records = []
    for item in EXAMPLES:
        chunks = source.chunks(item, 2)
        assert chunks[0].titles == (item.id,)
        assert chunks[0].is_gold
        assert bytes(chunks[0].ids).decode().endswith("\n\n")
        records.append(
            json.loads(json.dumps({"id": item.id, "titles": [c.titles for c in chunks]}))
        )
    source.close()
    assert score_retrieval(EXAMPLES, records, k=1)["recall_at_k"] == 1.0
