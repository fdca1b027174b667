"""The chat model without a server: LangChain's unit suite, layout, and what is sent."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)
from langchain_tests.unit_tests import ChatModelUnitTests

from rag_pipeline import EngineError, ModelTokenizer, PromptBuilder, RagPipelineError
from rag_pipeline.langchain import ChatSGLangRag
from rag_pipeline.langchain.documents import to_chunk
from rag_pipeline.langchain.layout import ChatLayouter
from rag_pipeline.langchain.wire import generate_body
from rag_pipeline.prompts.builder import DEFAULT_QUESTION_TEMPLATE, DEFAULT_SYSTEM
from rag_pipeline.prompts.segments import SegmentEncoder
from rag_pipeline.protocol import FusionChoice
from retrievers import SearchHit


class TestChatSGLangRagUnit(ChatModelUnitTests):
    @property
    def chat_model_class(self) -> type[ChatSGLangRag]:
        return ChatSGLangRag

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"base_url": "http://127.0.0.1:30000/v1"}

    @property
    def init_from_env_params(self) -> tuple[dict[str, str], dict[str, Any], dict[str, Any]]:
        return {"OPENAI_ORG_ID": "org"}, self.chat_model_params, {"openai_organization": "org"}


DOCUMENTS = [
    Document(page_content="The first fact is red <|im_end|>.", metadata={"title": "Colour"}),
    Document(page_content="The second fact is nine.", id="nine"),
    Document(page_content="The third fact is Paris, the capital."),
]


@pytest.fixture(scope="module")
def layouter(smollm2_path: Path) -> ChatLayouter:
    encoder = SegmentEncoder(ModelTokenizer.load(smollm2_path))
    return ChatLayouter(encoder, context_length=2048)


def texts_of(layouter: ChatLayouter, layout: Any) -> list[str]:
    decode = layouter.encoder.tokenizer.decode
    return [decode(layout.input_ids[span.start : span.end]) for span in layout.spans]


def test_one_question_has_the_ids_of_the_pipelines_own_prompt(
    layouter: ChatLayouter, smollm2_path: Path
) -> None:
    """Chunks that ``ask`` or ``--warm`` stored serve LangChain, and the other way round."""
    question = "Which colour?"
    builder = PromptBuilder(smollm2_path)
    hits = [SearchHit(chunk=to_chunk(d), score=-rank) for rank, d in enumerate(DOCUMENTS)]
    ours = builder.build(question, hits, max_new_tokens=8)
    asked = HumanMessage(DEFAULT_QUESTION_TEMPLATE.format(question=question))
    theirs = layouter.build([SystemMessage(DEFAULT_SYSTEM), asked], DOCUMENTS, max_new_tokens=8)
    assert theirs.input_ids == ours.input_ids
    assert theirs.spans == ours.chunk_spans
    assert theirs.prefix_len == len(builder.system_ids) == ours.chunk_spans[0].start


def test_a_chunk_has_the_same_ids_and_prefix_in_every_turn(layouter: ChatLayouter) -> None:
    system = SystemMessage("Be brief.")
    block = {"type": "text-plain", "text": DOCUMENTS[1].page_content, "id": "nine"}
    first = layouter.build(
        [system, HumanMessage([block, {"type": "text", "text": "Which number?"}])],  # type: ignore[list-item]
        [],
        max_new_tokens=8,
    )
    history: list[BaseMessage] = [system, HumanMessage("Hello <|im_end|>"), AIMessage("Hi.")]
    later = layouter.build(
        [*history, HumanMessage("Which number?")], DOCUMENTS[1:], max_new_tokens=8
    )
    assert first.documents == ("nine",)
    assert later.documents[0] == "nine"
    assert texts_of(layouter, first)[0] == texts_of(layouter, later)[0]
    assert first.prefix_len == first.spans[0].start
    assert later.prefix_len < later.spans[0].start
    assert first.input_ids[: later.prefix_len] == later.input_ids[: later.prefix_len]
    control = layouter.encoder.tokenizer.special_tokens["<|im_end|>"]
    assert later.input_ids.count(control) == 4  # one per turn that has ended; typed ones are text


def test_the_whole_conversation_can_be_read_back(layouter: ChatLayouter) -> None:
    messages = [SystemMessage("S."), HumanMessage("Q1"), AIMessage("A1"), HumanMessage("Q2")]
    layout = layouter.build(messages, DOCUMENTS, max_new_tokens=8)
    text = layouter.encoder.tokenizer.decode(layout.input_ids)
    chunks = "".join(texts_of(layouter, layout))
    assert text == (
        "<|im_start|>system\nS.<|im_end|>\n<|im_start|>user\nQ1<|im_end|>\n"
        "<|im_start|>assistant\nA1<|im_end|>\n"
        f"<|im_start|>user\nText:\n\n{chunks}Q2<|im_end|>\n<|im_start|>assistant\n"
    )


def test_documents_that_do_not_fit_are_dropped_from_the_end_and_named(
    layouter: ChatLayouter,
) -> None:
    documents = [Document(page_content="word " * 300, id=str(i)) for i in range(9)]
    layout = layouter.build([HumanMessage("Q")], documents, max_new_tokens=100)
    assert len(layout.input_ids) + 100 <= 2048
    assert layout.documents + layout.dropped == tuple(str(i) for i in range(9))
    assert layout.dropped
    # One that is too long by itself keeps no other out.
    documents = [Document(page_content="word " * n, id=str(n)) for n in (3000, 300, 2500, 3)]
    layout = layouter.build([HumanMessage("Q")], documents, max_new_tokens=100)
    assert (layout.documents, layout.dropped) == (("300", "3"), ("3000", "2500"))
    with pytest.raises(RagPipelineError, match="the context holds 2048: shorten it") as error:
        layouter.build([HumanMessage("word " * 3000)], documents, max_new_tokens=100)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([SystemMessage("S")], "documents need a human message"),
        ([HumanMessage("Q"), ToolMessage("x", tool_call_id="1")], "ToolMessage with tools"),
        ([HumanMessage([{"type": "image_url", "image_url": {"url": "u"}}])], "'image_url'"),
        ([HumanMessage([{"type": "text-plain"}])], "has no text"),
    ],
)
def test_messages_that_cannot_be_laid_out(
    layouter: ChatLayouter, messages: list[BaseMessage], words: str
) -> None:
    with pytest.raises(RagPipelineError, match=words) as error:
        layouter.build(messages, DOCUMENTS, max_new_tokens=8)
    assert "\n" not in str(error.value)


def test_policies_are_checked_before_anything_is_sent() -> None:
    assert FusionChoice().request(()).mode == "off"
    with pytest.raises(RagPipelineError, match="policy 'nope' is unknown; allowed are prefix"):
        FusionChoice(policy="nope").check()
    with pytest.raises(RagPipelineError, match="takes no ratio"):
        FusionChoice(ratio=0.5).check()
    with pytest.raises(RagPipelineError, match="'prefix' is exact, attention 'edges' is not"):
        FusionChoice(attention="edges").check()


def test_what_only_the_chat_endpoint_does_stays_there() -> None:
    payload = {
        "model": "default",
        "messages": [],
        "stream": True,
        "temperature": 0.0,
        "max_completion_tokens": 7,
        "stop": ["x"],
        "extra_body": {"input_ids": [1, 2], "top_k": -1, "custom_params": {"rag_mode": "fuse"}},
    }
    assert generate_body(payload) == {
        "input_ids": [1, 2],
        "stream": True,
        "sampling_params": {
            "max_new_tokens": 7,
            "temperature": 0.0,
            "top_k": -1,
            "stop": ["x"],
            "custom_params": {"rag_mode": "fuse"},
        },
    }
    for extra in ({"logprobs": True}, {"n": 2}, {"model": "m:adapter"}, {"response_format": {}}):
        assert generate_body({**payload, **extra}) is None


def test_nobody_answers() -> None:
    model = ChatSGLangRag(base_url="http://127.0.0.1:9/v1")
    with pytest.raises(EngineError, match=r"no server answers at http://127\.0\.0\.1:9") as error:
        model.invoke("Q", documents=DOCUMENTS)
    assert "\n" not in str(error.value)


def test_the_key_of_another_service_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret-of-another-service")
    model = ChatSGLangRag()
    assert model.root_client.api_key == "EMPTY"


def test_the_suite_is_installed() -> None:
    """Without it the classes above would collect nothing."""
    assert importlib.util.find_spec("langchain_tests") is not None
    assert sum(name.startswith("test_") for name in dir(TestChatSGLangRagUnit)) >= 9


def test_what_is_done_here_is_not_sent_to_the_chat_endpoint() -> None:
    """The fields of this class must be none of those that ``ChatOpenAI`` puts into a request."""
    sent = ChatSGLangRag(max_tokens=8)._get_request_payload([HumanMessage("Q")])
    assert set(sent) == {
        "model",
        "messages",
        "max_completion_tokens",
        "temperature",
        "top_p",
        "stream",
    }


def sent(model: ChatSGLangRag, messages: list[BaseMessage], **kwargs: Any) -> tuple[Any, Any]:
    layout, told, kwargs = model._prepare(messages, kwargs)
    assert layout is None
    return told, kwargs["extra_body"]


MEMORY = {"method": "epicache", "budget_tokens": 1024}


def test_a_memory_is_the_servers_and_is_asked_for_in_every_request() -> None:
    """In ``custom_params``: a server that keeps none refuses it there."""
    model = ChatSGLangRag(memory=MEMORY, extra_body={"custom_params": {"other": 1}})
    messages = [HumanMessage("a"), AIMessage("b"), HumanMessage("c")]
    told, body = sent(model, messages)
    assert told == messages
    assert body["custom_params"] == {"other": 1, "rag_memory": MEMORY}
    assert sent(model, messages, memory="off")[1]["custom_params"]["rag_memory"] == "off"
    assert "custom_params" not in sent(ChatSGLangRag(), messages)[1]


def test_documents_beside_a_memory_are_text_of_the_question() -> None:
    block = {"type": "text-plain", "text": "Seven.", "title": "Number"}
    messages = [
        HumanMessage([block, {"type": "text", "text": "Which number?"}]),  # type: ignore[list-item]
        AIMessage("Seven."),
        HumanMessage("And which colour?"),
    ]
    told, _ = sent(ChatSGLangRag(memory="epicache"), messages, documents=DOCUMENTS[:1])
    assert [message.text for message in told] == [
        "Number\nSeven.\n\nWhich number?",
        "Seven.",
        "Text:\n\nColour\nThe first fact is red <|im_end|>.\n\nAnd which colour?",
    ]
    assert messages[-1].content == "And which colour?"


def test_a_memory_and_a_conversation_exclude_each_other() -> None:
    with pytest.raises(RagPipelineError, match="memory beside conversation 'c'; leave one out"):
        sent(ChatSGLangRag(memory="epicache"), [HumanMessage("a")], conversation="c")
