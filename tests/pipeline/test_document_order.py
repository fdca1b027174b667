"""Where the retrieved documents stand in a prompt: of the builder, of LangChain's chat, and what is refused."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace

import pytest
from langchain_core.documents import Document
from langchain_core.messages import HumanMessage

from rag_pipeline.errors import RagPipelineError
from rag_pipeline.langchain.layout import ChatLayouter
from rag_pipeline.prompts.builder import PromptBuilder
from rag_pipeline.prompts.document_order import check_document_order, ordered
from rag_pipeline.prompts.power_order import placement_of
from rag_pipeline.prompts.segments import SegmentEncoder
from rag_pipeline.prompts.tokenizer import ModelTokenizer
from rag_pipeline.server.chat_prompt import prepare
from rag_pipeline.server.schemas import ChatRequest
from retrievers.types import Chunk, SearchHit

POWER = "power:block=16+window=2"


@pytest.fixture(scope="module")
def tokenizer(smollm2_path: Path) -> ModelTokenizer:
    return ModelTokenizer.load(smollm2_path)


def words(rank: int) -> str:
    return " ".join(random.Random(rank).choices(["red", "blue", "one", "two"], k=9 + 5 * rank))


RANKS = [3, 0, 4, 1, 2, 5, 7, 6]
"""Ranks of the hits as the retriever gives them, not the best first."""
HITS = [
    SearchHit(
        chunk=Chunk(
            id=str(rank),
            document_id=str(rank),
            text=words(rank),
            title="",
            start=0,
            end=1,
            num_tokens=1,
        ),
        score=1.0 - rank / 10,
    )
    for rank in RANKS
]


def ranks_of(layout) -> list[int]:
    return [int(span.chunk_id) for span in layout.chunk_spans]


@pytest.mark.parametrize(
    ("order", "want"),
    [
        ("retrieved", RANKS),
        ("best_last", [7, 6, 5, 4, 3, 2, 1, 0]),
        ("both_ends", [1, 3, 5, 7, 6, 4, 2, 0]),
    ],
)
def test_documents_stand_as_the_order_says(tokenizer, order, want):
    builder = PromptBuilder(tokenizer, context_length=4096, document_order=order)
    layout = builder.build("Why?", HITS, max_new_tokens=4)
    assert ranks_of(layout) == want
    assert [int(hit.chunk.id) for hit in layout.chunks] == want
    for span, hit in zip(layout.chunk_spans, layout.chunks, strict=True):
        assert layout.input_ids[span.start : span.end] == builder.chunk_ids(hit.chunk)
    # A prompt may want another than its builder.
    again = builder.build("Why?", HITS, max_new_tokens=4, document_order="retrieved")
    assert ranks_of(again) == RANKS
    assert sorted(again.input_ids) == sorted(layout.input_ids)


def best_read(layout, method: str, best: int) -> float:
    """Tokens that the last row reads of the best documents, as a share."""
    spans = sorted(layout.chunk_spans, key=lambda span: int(span.chunk_id))
    lengths = [span.end - span.start for span in spans]
    before = min(span.start for span in spans)
    behind = len(layout.input_ids) - before - sum(lengths)
    found = placement_of(ranks_of(layout), lengths, before=before, behind=behind, method=method)
    return sum(found.shares[:best]) / best


def test_a_pattern_s_order_lets_the_question_read_the_best(tokenizer):
    builder = PromptBuilder(tokenizer, context_length=4096, document_order=POWER)
    placed = builder.build("Why?", HITS, max_new_tokens=4)
    assert sorted(ranks_of(placed)) == sorted(RANKS)
    usual = builder.build("Why?", HITS, max_new_tokens=4, document_order="retrieved")
    assert best_read(placed, POWER, 2) == 1.0
    assert best_read(placed, POWER, 3) > best_read(usual, POWER, 3) + 0.2


def test_what_does_not_fit_is_dropped_before_the_others_are_placed(tokenizer):
    whole = PromptBuilder(tokenizer, context_length=4096)
    room = len(whole.build("Why?", HITS, max_new_tokens=4).input_ids) - 1
    tight = PromptBuilder(tokenizer, context_length=room, document_order="best_last")
    layout = tight.build("Why?", HITS, max_new_tokens=4)
    assert ranks_of(layout) == [6, 5, 4, 3, 2, 1, 0]
    assert [int(hit.chunk.id) for hit in layout.dropped] == [7]


@pytest.mark.parametrize("order", ["best_last", POWER])
def test_a_chat_of_langchain_stands_as_a_prompt_does(tokenizer, order):
    layouter = ChatLayouter(SegmentEncoder(tokenizer), context_length=4096, document_order=order)
    ranked = [Document(page_content=words(rank), id=str(rank)) for rank in sorted(RANKS)]
    own = {"type": "text-plain", "text": "a document of the message", "id": "own"}
    messages = [
        HumanMessage([own, {"type": "text", "text": "Look."}]),
    ]
    layout = layouter.build(messages, ranked, max_new_tokens=4)
    found = [name for name in layout.documents if name != "own"]
    assert sorted(found) == [str(rank) for rank in sorted(RANKS)]
    spans = {span.chunk_id: span for span in layout.spans}
    lengths = [spans[str(rank)].end - spans[str(rank)].start for rank in sorted(RANKS)]
    before = min(span.start for name, span in spans.items() if name != "own")
    want = ordered(
        order,
        [-rank for rank in sorted(RANKS)],
        lengths,
        before=before,
        behind=len(layout.input_ids) - before - sum(lengths),
    )
    assert found == [str(rank) for rank in want]
    plain = ChatLayouter(layouter.encoder, context_length=4096)
    usual = plain.build(messages, ranked, max_new_tokens=4)
    assert sorted(layout.input_ids) == sorted(usual.input_ids)
    assert usual.documents != layout.documents


def test_an_empty_document_stands_nowhere_and_the_others_are_still_put_in_order(tokenizer):
    layouter = ChatLayouter(
        SegmentEncoder(tokenizer),
        context_length=4096,
        chunk_template="{text}",
        document_order="best_last",
    )
    given = [
        Document(page_content=words(rank) if rank != 1 else "", id=str(rank)) for rank in range(4)
    ]
    layout = layouter.build([HumanMessage("Why?")], given, max_new_tokens=4)
    assert layout.documents == ("3", "2", "0")
    alone = layouter.build([HumanMessage("Why?")], given[1:2] * 2, max_new_tokens=4)
    assert alone.documents == ()


@pytest.mark.parametrize("order", ["best", "", "sale", "power:window=0", "power:" + "x" * 200])
def test_what_is_no_order_is_refused_in_one_line(tokenizer, order):
    with pytest.raises(
        RagPipelineError, match=r"document_order is .*best_last.*power:block=64"
    ) as e:
        check_document_order(order)
    assert "\n" not in str(e.value)
    with pytest.raises(RagPipelineError, match="document_order"):
        PromptBuilder(tokenizer, context_length=99, document_order=order)
    builder = PromptBuilder(tokenizer, context_length=99)
    with pytest.raises(RagPipelineError, match="document_order"):
        builder.build("Why?", [], max_new_tokens=1, document_order=order)


def test_equal_scores_stay_in_the_order_of_the_retriever():
    assert ordered("best_last", [0.5, 0.9, 0.5], [1, 1, 1], before=1, behind=1) == [2, 0, 1]
    assert ordered("both_ends", [], [], before=1, behind=1) == []
    assert ordered(POWER, [1.0], [5], before=1, behind=1) == [0]


def test_a_server_searches_nothing_for_a_request_that_names_no_order():
    service = SimpleNamespace(settings=SimpleNamespace(policy="query"))  # no index to search
    body = ChatRequest.model_validate(
        {"messages": [{"role": "user", "content": "Why?"}], "rag": {"document_order": "best"}}
    )
    with pytest.raises(RagPipelineError, match="document_order is 'best'"):
        prepare(service, None, body)
