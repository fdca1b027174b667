"""The chat model and the runnable against a real server: LangChain's suite, reuse, streams."""

from __future__ import annotations

import asyncio
import time
from pydoc_data.topics import topics
from typing import Any, ClassVar

import httpx
import openai
import pytest
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests

from rag_pipeline import RagPipelineError
from rag_pipeline.langchain import ChatSGLangRag, FaissVectorStore, RagRunnable

pytestmark = [
    pytest.mark.engine,
    pytest.mark.slow,
    # The suite mixes sync and async tests; asyncio's mark is meant for the latter only.
    pytest.mark.filterwarnings("ignore:The test .* is marked with '@pytest.mark.asyncio'"),
]

ANSWER_TOKENS = 8
EMBEDDING = DeterministicFakeEmbedding(size=16)


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
        return {"base_url": f"{type(self).url}/v1", "max_tokens": ANSWER_TOKENS}

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


def document(topic: str) -> Document:
    text = topics[topic].strip()[:700]
    return Document(page_content=text, id=topic, metadata={"title": topic})


DOCUMENTS = [document(name) for name in ("with", "lambda", "for", "import")]


@pytest.fixture(scope="module")
def model(model_server: str) -> ChatSGLangRag:
    return ChatSGLangRag(base_url=f"{model_server}/v1", max_tokens=ANSWER_TOKENS)


def ask_until_reused(model: ChatSGLangRag, documents: list[Document]) -> dict[str, Any]:
    """The engine stores new chunks when it is idle; ask again, as a user would, until it has."""
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


def sum_of_kinds(report: dict[str, Any]) -> int:
    kinds = ("exact_prefix", "reused", "recomputed", "fresh")
    return sum(report["usage"][f"{kind}_tokens"] for kind in kinds)


def test_chunks_are_reused_in_another_order_and_say_so(model: ChatSGLangRag) -> None:
    report = ask_until_reused(model, DOCUMENTS[:2])
    assert report["policy"] == "query"
    assert report["documents"] == ["with", "lambda"]
    ask_until_reused(model, DOCUMENTS[2:3])
    httpx.post(f"{model._server().url}/flush_cache", timeout=30, trust_env=False)
    # Three chunks that were never together, in an order that no prompt had.
    mixed = [DOCUMENTS[2], DOCUMENTS[1], DOCUMENTS[0]]
    spans = model._layouts().build([HumanMessage("Why?")], mixed, max_new_tokens=8).spans
    message = model.invoke([HumanMessage("Why?")], documents=mixed)
    usage = message.response_metadata["rag"]["usage"]
    assert usage["reused_tokens"] + usage["recomputed_tokens"] > 0.9 * sum(map(len, spans))
    assert usage["reused_tokens"] > usage["recomputed_tokens"]
    assert message.usage_metadata is not None
    assert message.usage_metadata["input_tokens"] == usage["prompt_tokens"]
    assert message.response_metadata["finish_reason"] in ("stop", "length")

    httpx.post(f"{model._server().url}/flush_cache", timeout=30, trust_env=False)
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

    assert asyncio.run(collect()) == whole.content


def test_prefix_policy_is_ordinary_prefill_and_fusion_at_ratio_one_agrees(
    model_server: str,
) -> None:
    plain = ChatSGLangRag(base_url=f"{model_server}/v1", max_tokens=8, policy="prefix")
    asked = [SystemMessage("Answer briefly."), HumanMessage("What is it about?")]
    exact = plain.invoke(asked, documents=DOCUMENTS[:2])
    usage = exact.response_metadata["rag"]["usage"]
    assert usage["reused_tokens"] == usage["recomputed_tokens"] == 0
    # The chat endpoint, given the text of the same prompt, tokenises and answers the same.
    text = plain._layouts().encoder.tokenizer.decode(
        plain._layouts().build(asked, DOCUMENTS[:2], max_new_tokens=8).input_ids
    )
    content = text.split("<|im_start|>user\n")[1].split("<|im_end|>")[0]
    stock = ChatOpenAI(
        base_url=f"{model_server}/v1", api_key="EMPTY", model="default", max_tokens=8, temperature=0
    )
    said = stock.invoke([SystemMessage("Answer briefly."), HumanMessage(content)])
    assert said.content == exact.content


def test_the_next_turn_of_a_conversation_loads_the_one_before(model: ChatSGLangRag) -> None:
    ask_until_reused(model, DOCUMENTS[:2])
    blocks = [
        {"type": "text-plain", "text": d.page_content, "title": d.id, "id": d.id}
        for d in (DOCUMENTS[1], DOCUMENTS[0])
    ]
    asked: list[Any] = [HumanMessage(["Text:\n\n", *blocks, "What is it about?"])]
    first = model.invoke(asked, conversation="talk")
    asked += [first, HumanMessage("And what else?")]
    alone = model.invoke(asked).response_metadata["rag"]["usage"]
    behind = alone["prompt_tokens"] - first.response_metadata["rag"]["usage"]["prompt_tokens"]
    loaded = model.invoke(asked, conversation="talk").response_metadata["rag"]["usage"]
    assert loaded["fresh_tokens"] <= behind < alone["fresh_tokens"]


def test_documents_bound_and_in_messages(model: ChatSGLangRag) -> None:
    bound = model.bind(documents=DOCUMENTS[:1])
    block = {"type": "text-plain", "text": DOCUMENTS[0].page_content, "title": "with", "id": "with"}
    inside = model.invoke([HumanMessage(["Text:\n\n", block, "What is it about?"])])
    given = bound.invoke([HumanMessage("What is it about?")])
    assert inside.content == given.content
    assert inside.response_metadata["rag"]["documents"] == ["with"]
    assert (
        inside.response_metadata["rag"]["usage"]["prompt_tokens"]
        == given.response_metadata["rag"]["usage"]["prompt_tokens"]
    )


def test_without_documents_it_is_an_ordinary_chat_model(model: ChatSGLangRag) -> None:
    history = [HumanMessage("Say red."), AIMessage("red"), HumanMessage("Again.")]
    message = model.invoke(history)
    assert sum_of_kinds(message.response_metadata["rag"]) > 0
    assert "documents" not in message.response_metadata["rag"]
    streamed = "".join(str(piece.content) for piece in model.stream(history))
    assert streamed == message.content


def test_what_cannot_be_is_refused(model: ChatSGLangRag, model_server: str) -> None:
    with pytest.raises(RagPipelineError, match="tools and documents in one request"):
        model.invoke("Q", documents=DOCUMENTS, tools=[{"type": "function"}])
    with pytest.raises(RagPipelineError, match="the context holds"):
        model.invoke("word " * 9000, documents=[])
    with pytest.raises(RagPipelineError, match="policy 'nope' is unknown"):
        ChatSGLangRag(base_url=f"{model_server}/v1", policy="nope").invoke("Q", documents=[])
    with pytest.raises(openai.BadRequestError, match="fusion"):
        model.invoke("Q", extra_body={"custom_params": {"rag_spans": [9, 1]}})


# -- the runnable -----------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["ours", "any vector store"])
def retriever(request: pytest.FixtureRequest) -> Any:
    kind = FaissVectorStore if request.param == "ours" else InMemoryVectorStore
    store = kind(EMBEDDING)
    store.add_documents(DOCUMENTS, ids=[str(d.id) for d in DOCUMENTS])
    return store.as_retriever(search_kwargs={"k": 2})


class Recorder(BaseCallbackHandler):
    def __init__(self) -> None:
        self.seen: list[str] = []
        self.tags: list[list[str]] = []
        self.tokens = 0

    def on_chain_start(self, serialized: Any, inputs: Any, **kwargs: Any) -> None:
        self.seen.append(f"chain {kwargs.get('name')}")
        self.tags.append(kwargs.get("tags") or [])

    def on_retriever_end(self, documents: Any, **kwargs: Any) -> None:
        self.seen.append(f"retriever {len(documents)}")
        self.tags.append(kwargs.get("tags") or [])

    def on_chat_model_start(self, serialized: Any, messages: Any, **kwargs: Any) -> None:
        self.seen.append("model")
        self.tags.append(kwargs.get("tags") or [])

    def on_llm_new_token(self, token: str, **kwargs: Any) -> None:
        self.tokens += 1


def settled_answer(rag: RagRunnable, question: str) -> dict[str, Any]:
    """An answer of an engine at rest: fused or read from the tree, sums round otherwise."""
    deadline = time.monotonic() + 120
    last: dict[str, Any] = {}
    while True:
        answer: dict[str, Any] = rag.invoke(question)
        if not builds_pending(rag) and answer["rag"]["usage"] == last:
            return answer
        assert time.monotonic() < deadline, answer
        last = answer["rag"]["usage"]


def builds_pending(rag: RagRunnable) -> int:
    url = rag.llm._server().url  # type: ignore[attr-defined]
    info = httpx.get(f"{url}/server_info", timeout=30, trust_env=False).json()
    return sum(state["rag_fusion"]["pending"] for state in info["internal_states"])


def test_answer_with_sources_in_every_way(model: ChatSGLangRag, retriever: Any) -> None:
    rag = RagRunnable(retriever=retriever, llm=model)
    question = "What does the with statement do?"
    whole = rag.invoke(question)
    assert set(whole) == {"question", "documents", "answer", "rag"}
    assert len(whole["documents"]) == 2
    assert whole["rag"]["documents"] == [d.id for d in whole["documents"]]
    assert whole["answer"]
    assert sum_of_kinds(whole["rag"]) == whole["rag"]["usage"]["prompt_tokens"]
    assert len(rag.invoke({"question": question}, k=3)["documents"]) == 3
    assert len(rag.invoke(question, max_tokens=2)["answer"]) < len(whole["answer"])

    whole = settled_answer(rag, question)
    pieces = list(rag.stream(question))
    assert list(pieces[0]) == ["question", "documents"]
    assert sum("answer" in piece for piece in pieces) > 1
    added = pieces[0]
    for piece in pieces[1:]:
        added = added + piece
    assert {key: added[key] for key in ("question", "documents", "answer")} == {
        key: whole[key] for key in ("question", "documents", "answer")
    }
    assert added["rag"]["documents"] == whole["rag"]["documents"]

    async def asynchronous() -> tuple[Any, str, list[str]]:
        answer = await rag.ainvoke(question)
        text = "".join([p.get("answer", "") async for p in rag.astream(question)])
        events = [event["event"] async for event in rag.astream_events(question, version="v2")]
        return answer, text, events

    answer, text, events = asyncio.run(asynchronous())
    assert answer["answer"] == text == whole["answer"]
    for kind in ("on_retriever_end", "on_chat_model_stream", "on_chain_stream", "on_chain_end"):
        assert kind in events


def test_config_callbacks_and_batch(model: ChatSGLangRag, retriever: Any) -> None:
    rag = RagRunnable(retriever=retriever, llm=model)
    recorder = Recorder()
    config: Any = {"callbacks": [recorder], "tags": ["mine"], "run_name": "named"}
    answers = rag.batch(
        ["One?", "Two?", ""], {**config, "max_concurrency": 2}, return_exceptions=True
    )
    assert [a["question"] for a in answers[:2]] == ["One?", "Two?"]
    assert isinstance(answers[2], RagPipelineError)
    assert recorder.seen.count("chain named") == 3
    assert recorder.seen.count("retriever 2") == 2
    assert recorder.seen.count("model") == 2
    assert all("mine" in tags for tags in recorder.tags)
    streamed = Recorder()
    list(rag.stream("Three?", {"callbacks": [streamed]}))
    assert streamed.tokens > 1
    chain = rag | (lambda found: found["answer"])
    assert isinstance(chain.invoke("Four?"), str)


def test_a_conversation_and_another_chat_model(
    model: ChatSGLangRag, retriever: Any, model_server: str
) -> None:
    history = [HumanMessage("Hello."), AIMessage("Hello. Ask me.")]
    rag = RagRunnable(retriever=retriever, llm=model.bind(stop=["\n"]))
    turn = rag.invoke({"question": "What is a lambda?", "chat_history": history})
    assert turn["answer"]
    assert "\n" not in turn["answer"]
    assert len(turn["rag"]["documents"]) == 2
    other = ChatOpenAI(
        base_url=f"{model_server}/v1", api_key="EMPTY", model="default", max_tokens=8, temperature=0
    )
    plain = RagRunnable(retriever=retriever, llm=other).invoke("What is a lambda?")
    assert plain["answer"]
    assert plain["rag"] == {}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("  ", "the question is empty"),
        ({"quest": "x"}, "give question, and chat_history"),
        ({"question": "x", "chat_history": ["y"]}, "must hold LangChain messages"),
    ],
)
def test_bad_input_of_the_runnable(model: ChatSGLangRag, given: Any, words: str) -> None:
    store = InMemoryVectorStore(EMBEDDING)
    rag = RagRunnable(retriever=store.as_retriever(), llm=model)
    with pytest.raises(RagPipelineError, match=words) as error:
        rag.invoke(given)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="InMemoryVectorStore is no LangChain runnable"):
        RagRunnable(retriever=store, llm=model)
