"""A prompt holds each text once, however often the corpus holds it."""

from __future__ import annotations

from collections.abc import Mapping
from pydoc_data.topics import topics

from retrievers import DistinctRetriever
from retrievers.distinct import distinct
from retrievers.types import Chunk, SearchHit


def hits(*texts: str) -> list[SearchHit]:
    return [
        SearchHit(
            chunk=Chunk(id=str(i), document_id=str(i), text=text, title="", start=0, end=1, num_tokens=0),
            score=-i,
        )
        for i, text in enumerate(texts)
    ]  # fmt: skip


def ids(found: list[SearchHit]) -> list[str]:
    return [hit.chunk.id for hit in found]


def test_a_copy_is_left_out_and_the_next_best_takes_its_place() -> None:
    text = topics["with"]
    copy = text.upper().replace(" ", "\n")
    found = hits(text, copy, text[: len(text) // 2], topics["break"], topics["continue"])
    assert ids(distinct(found, 2)) == ["0", "3"]
    assert ids(distinct(found, 9)) == ["0", "3", "4"]


def test_what_two_better_ones_hold_together_is_nothing_new() -> None:
    first, second = topics["while"], topics["lambda"]
    assert ids(distinct(hits(first, second, first[-400:] + second[:400]), 3)) == ["0", "1"]


def test_neighbours_that_overlap_by_half_both_stay() -> None:
    text = topics["for"]
    size = len(text) // 2
    assert ids(distinct(hits(text[:size], text[size // 2 : size // 2 + size]), 2)) == ["0", "1"]


def test_short_texts_are_compared_whole_and_texts_without_words_are_kept() -> None:
    assert ids(distinct(hits("Tea.", "Coffee.", "tea!", "***", "***", ""), 9)) == [
        "0", "1", "3", "4", "5",
    ]  # fmt: skip


def test_the_retriever_asks_for_more_than_it_returns() -> None:
    class Base:
        def search(
            self, query: str, *, k: int, where: Mapping[str, object] | None = None
        ) -> list[SearchHit]:
            assert where == {"lang": "en"}
            return hits(*["the same words in every hit"] * 4, *topics.values())[:k]

    found = DistinctRetriever(Base()).search("x", k=3, where={"lang": "en"})
    assert len(found) == 3
    assert ids(found)[:2] == ["0", "4"]
