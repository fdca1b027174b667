from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from retrievers import (
    Chunk,
    CrossEncoderReranker,
    HybridRetriever,
    RerankedRetriever,
    RetrievalError,
    SearchHit,
)


def chunk(name: str) -> Chunk:
    return Chunk(
        id=name, document_id=name, text=f"text of {name}", title=name, start=0, end=1, num_tokens=1
    )


class Ranking:
    """A retriever with a given answer, which honours k."""

    def __init__(self, names: str) -> None:
        self.names = names
        self.calls: list[tuple[int, Mapping[str, object] | None]] = []

    def search(
        self, query: str, *, k: int, where: Mapping[str, object] | None = None
    ) -> list[SearchHit]:
        self.calls.append((k, where))
        return [SearchHit(chunk=chunk(n), score=9.0 - i) for i, n in enumerate(self.names[:k])]


def test_fusion_by_hand() -> None:
    hits = HybridRetriever([Ranking("abc"), Ranking("bd")], k0=60).search("q", k=4)
    assert [hit.chunk.id for hit in hits] == ["b", "a", "d", "c"]
    assert [hit.score for hit in hits] == pytest.approx(
        [1 / 62 + 1 / 61, 1 / 61, 1 / 62, 1 / 63], rel=1e-12
    )


def test_weights_depth_and_filter_are_passed_on() -> None:
    first, second = Ranking("ab"), Ranking("cd")
    retriever = HybridRetriever([first, second], k0=0, depth=7, weights=[1, 3])
    hits = retriever.search("q", k=2, where={"x": 1})
    assert [(hit.chunk.id, hit.score) for hit in hits] == [("c", 3.0), ("d", 1.5)]
    assert first.calls == second.calls == [(7, {"x": 1})]
    retriever.search("q", k=20)
    assert first.calls[-1] == (20, None)


def test_equal_scores_keep_the_order_of_the_retrievers() -> None:
    hits = HybridRetriever([Ranking("ab"), Ranking("cd")]).search("q", k=4)
    assert [hit.chunk.id for hit in hits] == ["a", "c", "b", "d"]


@pytest.mark.parametrize(
    "options", [{"k0": -1}, {"depth": 0}, {"weights": [1.0]}, {"weights": [1.0, -1.0]}]
)
def test_bad_hybrid_options(options: dict[str, object]) -> None:
    with pytest.raises(RetrievalError):
        HybridRetriever([Ranking("a"), Ranking("b")], **options)  # type: ignore[arg-type]
    with pytest.raises(RetrievalError):
        HybridRetriever([])


class LengthReranker:
    def score(self, query: str, passages: Sequence[str]) -> list[float]:
        return [float(passage.endswith(query)) for passage in passages]


def test_reranking_reorders_and_cuts() -> None:
    base = Ranking("abcdef")
    hits = RerankedRetriever(base, LengthReranker(), depth=4).search("c", k=2)
    assert [(hit.chunk.id, hit.score) for hit in hits] == [("c", 1.0), ("a", 0.0)]
    assert base.calls == [(4, None)]


@pytest.fixture(scope="module")
def cross_encoder_folder(embedder_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packaged encoder with a seeded scoring head: a real cross-encoder, if a bad judge."""
    import torch
    from transformers import AutoTokenizer, BertForSequenceClassification

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("cross")
    model = BertForSequenceClassification.from_pretrained(embedder_folder, num_labels=1)
    model.classifier.weight.data.normal_(std=2)  # else every score is nearly one half
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(embedder_folder).save_pretrained(folder)
    return folder


def test_cross_encoder_scores_equal_a_direct_forward(cross_encoder_folder: Path) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    passages = ["a cat sat", "rain falls in the mountains all day", "hm"]
    scores = CrossEncoderReranker(cross_encoder_folder, device="cpu").score("a cat", passages)
    model = AutoModelForSequenceClassification.from_pretrained(cross_encoder_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(cross_encoder_folder)
    with torch.inference_mode():
        encoded = tokenizer(
            [["a cat", text] for text in passages], padding=True, return_tensors="pt"
        )
        expected = torch.sigmoid(model(**encoded).logits[:, 0].float()).tolist()
    assert scores == pytest.approx(expected, abs=1e-4)
    assert len({round(score, 5) for score in scores}) == 3


def test_cross_encoder_in_a_retriever(cross_encoder_folder: Path) -> None:
    reranker = CrossEncoderReranker(cross_encoder_folder, device="cpu")
    assert reranker.score("q", []) == []
    hits = RerankedRetriever(Ranking("abcd"), reranker).search("text of c", k=3)
    scores = reranker.score("text of c", [f"text of {name}" for name in "abcd"])
    assert [hit.score for hit in hits] == pytest.approx(sorted(scores, reverse=True)[:3], abs=1e-5)


def test_missing_reranker_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RetrievalError, match="cannot load the reranker") as caught:
        CrossEncoderReranker(tmp_path / "nothing").score("q", ["p"])
    assert "\n" not in str(caught.value)
