"""The chat model against a real server: LangChain's suite, reuse, streams."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, ClassVar

import httpx
import openai
import pytest
from langchain_core.documents import Document
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests

from rag_pipeline import RagPipelineError
from rag_pipeline.langchain import ChatSGLangRag

pytestmark = [
    pytest.mark.engine,
    pytest.mark.slow,
    # The suite mixes sync and async tests; asyncio's mark is meant for the latter only.
    pytest.mark.filterwarnings("ignore:The test .* is marked with '@pytest.mark.asyncio'"),
]


@pytest.mark.asyncio
class TestChatSGLangRagStandard(ChatModelIntegrationTests):
    """Against SmolLM2-135M: it calls no tools; what a grammar could force takes minutes."""

    @pytest.fixture(autouse=True)
    def _server(self, model_server: str) -> None:
        type(self).url = model_server

    url: ClassVar[str] = ""

    @property
    def chat_model_class(self) -> type[ChatSGLangRag]:
        return ChatSGLangRag

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"base_url": f"{type(self).url}/v1", "max_tokens": 8}

    @property
    def has_tool_calling(self) -> bool:
        return False

    @property
    def has_structured_output(self) -> bool:
        return False

    @property
    def supports_model_override(self) -> bool:
        return True

    @property
    def model_override_value(self) -> str:
        return "another-name"  # SGLang serves one model under any name, and gives the name back

    @property
    def supports_json_mode(self) -> bool:
        return False

    @property
    def supports_image_inputs(self) -> bool:
        return False


@pytest.fixture
def ask_until_reused(
    model: ChatSGLangRag, sum_of_kinds: Callable[[dict[str, Any]], int]
) -> Callable[[list[Document]], dict[str, Any]]:
    """The engine stores new chunks when it is idle; ask again, as a user would, until it has."""

    def ask(documents: list[Document]) -> dict[str, Any]:
        deadline = time.monotonic() + 120
        while True:
            # Else the radix tree would serve the repeated prompt, exactly.
            httpx.post(f"{model._server().url}/flush_cache", timeout=30, trust_env=False)
            message = model.invoke([HumanMessage("What is it about?")], documents=documents)
            report: dict[str, Any] = message.response_metadata["rag"]
            assert sum_of_kinds(report) == report["usage"]["prompt_tokens"]
            if report["usage"]["reused_tokens"]:
                return report
            assert time.monotonic() < deadline, report
            time.sleep(1)

    return ask


def test_chunks_are_reused_in_another_order_and_say_so(
    model: ChatSGLangRag,
    ask_until_reused: Callable[[list[Document]], dict[str, Any]],
    documents: list[Document],
    empty_tree: Callable[[], None],
) -> None:
    report = ask_until_reused(documents[:2])
    assert report["policy"] == "query"
    assert report["documents"] == ["with", "lambda"]
    ask_until_reused(documents[2:3])
    empty_tree()
    # Three chunks that were never together, in an order that no prompt had.
    mixed = [documents[2], documents[1], documents[0]]
    spans = model._layouts().build([HumanMessage("Why?")], mixed, max_new_tokens=8).spans
    message = model.invoke([HumanMessage("Why?")], documents=mixed)
    usage = message.response_metadata["rag"]["usage"]
    assert usage["reused_tokens"] + usage["recomputed_tokens"] > 0.9 * sum(map(len, spans))
    assert usage["reused_tokens"] > usage["recomputed_tokens"]
    assert message.usage_metadata is not None
    assert message.usage_metadata["input_tokens"] == usage["prompt_tokens"]
    assert message.response_metadata["finish_reason"] in ("stop", "length")

    empty_tree()
    # A stream answers the same and reports the same kinds, in its last message.
    whole: Any = None
    pieces = 0
    for piece in model.stream([HumanMessage("Why?")], documents=mixed):
        pieces += bool(piece.content)
        whole = piece if whole is None else whole + piece
    assert pieces > 1
    report = whole.response_metadata["rag"]
    assert report["documents"] == ["for", "lambda", "with"]
    assert report["usage"]["prompt_tokens"] == usage["prompt_tokens"]
    assert report["usage"]["reused_tokens"] > 0
    assert whole.usage_metadata["input_tokens"] == usage["prompt_tokens"]
    assert whole.response_metadata["finish_reason"] == message.response_metadata["finish_reason"]

    async def collect() -> str:
        parts = model.astream([HumanMessage("Why?")], documents=mixed)
        return "".join([str(part.content) async for part in parts])

    empty_tree()
    assert asyncio.run(collect()) == whole.content


def test_prefix_policy_is_ordinary_prefill_and_fusion_at_ratio_one_agrees(
    model_server: str, documents: list[Document]
) -> None:
    plain = ChatSGLangRag(base_url=f"{model_server}/v1", max_tokens=8, policy="prefix")
    asked = [SystemMessage("Answer briefly."), HumanMessage("What is it about?")]
    exact = plain.invoke(asked, documents=documents[:2])
    usage = exact.response_metadata["rag"]["usage"]
    assert usage["reused_tokens"] == usage["recomputed_tokens"] == 0
    # The chat endpoint, given the text of the same prompt, tokenises and answers the same.
    text = plain._layouts().encoder.tokenizer.decode(
        plain._layouts().build(asked, documents[:2], max_new_tokens=8).input_ids
    )
    content = text.split("<|im_start|>user\n")[1].split("<|im_end|>")[0]
    stock = ChatOpenAI(
        base_url=f"{model_server}/v1", api_key="EMPTY", model="default", max_tokens=8, temperature=0
    )
    said = stock.invoke([SystemMessage("Answer briefly."), HumanMessage(content)])
    assert said.content == exact.content


def test_the_next_turn_of_a_conversation_loads_the_one_before(
    model: ChatSGLangRag,
    ask_until_reused: Callable[[list[Document]], dict[str, Any]],
    documents: list[Document],
) -> None:
    ask_until_reused(documents[:2])
    blocks = [
        {"type": "text-plain", "text": d.page_content, "title": d.id, "id": d.id}
        for d in (documents[1], documents[0])
    ]
    asked: list[Any] = [HumanMessage(["Text:\n\n", *blocks, "What is it about?"])]
    first = model.invoke(asked, conversation="talk")
    asked += [first, HumanMessage("And what else?")]
    alone = model.invoke(asked).response_metadata["rag"]["usage"]
    behind = alone["prompt_tokens"] - first.response_metadata["rag"]["usage"]["prompt_tokens"]
    loaded = model.invoke(asked, conversation="talk").response_metadata["rag"]["usage"]
    assert loaded["fresh_tokens"] <= behind < alone["fresh_tokens"]


def test_a_long_conversation_loses_its_oldest_turns_and_says_so(model: ChatSGLangRag) -> None:
    said: list[Any] = [SystemMessage("Be brief.")]
    for turn in range(30):
        said += [HumanMessage(f"{turn} " + "word " * 200), AIMessage(f"{turn} " + "yes " * 200)]
    asked = [*said, HumanMessage("And now?")]
    message = model.invoke(asked, conversation="long")
    report = message.response_metadata["rag"]
    assert 0 < report["truncated"]["turns"] < 30
    assert report["documents"] == []
    limit = model._layouts().context_length
    assert report["usage"]["prompt_tokens"] <= limit
    first, *others = model.stream(asked, conversation="long")
    streamed: Any = first
    for piece in others:
        streamed += piece
    assert streamed.response_metadata["rag"]["truncated"] == report["truncated"]
    strict = model.model_copy(update={"chat_truncation": "disabled"})
    with pytest.raises(RagPipelineError, match="shorten it"):
        strict.invoke(asked, conversation="long")


def test_documents_bound_and_in_messages(model: ChatSGLangRag, documents: list[Document]) -> None:
    bound = model.bind(documents=documents[:1])
    block = {"type": "text-plain", "text": documents[0].page_content, "title": "with", "id": "with"}
    inside = model.invoke([HumanMessage(["Text:\n\n", block, "What is it about?"])])
    given = bound.invoke([HumanMessage("What is it about?")])
    assert inside.content == given.content
    assert inside.response_metadata["rag"]["documents"] == ["with"]
    assert (
        inside.response_metadata["rag"]["usage"]["prompt_tokens"]
        == given.response_metadata["rag"]["usage"]["prompt_tokens"]
    )


def test_without_documents_it_is_an_ordinary_chat_model(
    model: ChatSGLangRag, sum_of_kinds: Callable[[dict[str, Any]], int]
) -> None:
    history = [HumanMessage("Say red."), AIMessage("red"), HumanMessage("Again.")]
    message = model.invoke(history)
    assert sum_of_kinds(message.response_metadata["rag"]) > 0
    assert "documents" not in message.response_metadata["rag"]
    streamed = "".join(str(piece.content) for piece in model.stream(history))
    assert streamed == message.content


def test_what_cannot_be_is_refused(
    model: ChatSGLangRag, model_server: str, documents: list[Document]
) -> None:
    with pytest.raises(
        RagPipelineError, match="tools and documents, or a conversation, in one request"
    ):
        model.invoke("Q", documents=documents, tools=[{"type": "function"}])
    with pytest.raises(RagPipelineError, match="the context holds"):
        model.invoke("word " * 9000, documents=[])
    with pytest.raises(RagPipelineError, match="policy 'nope' is unknown"):
        ChatSGLangRag(base_url=f"{model_server}/v1", policy="nope").invoke("Q", documents=[])
    with pytest.raises(openai.BadRequestError, match="fusion"):
        model.invoke("Q", extra_body={"custom_params": {"rag_spans": [9, 1]}})
