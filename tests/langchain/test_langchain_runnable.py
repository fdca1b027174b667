"""The runnable against a real server: answers in every way, callbacks, conversations, bad input."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_openai import ChatOpenAI

from rag_pipeline import RagPipelineError
from rag_pipeline.langchain import ChatSGLangRag, FaissVectorStore, RagRunnable

pytestmark = [pytest.mark.engine, pytest.mark.slow]

EMBEDDING = DeterministicFakeEmbedding(size=16)


@pytest.fixture(scope="module", params=["ours", "any vector store"])
def retriever(request: pytest.FixtureRequest, documents: list[Document]) -> Any:
    kind = FaissVectorStore if request.param == "ours" else InMemoryVectorStore
    store = kind(EMBEDDING)
    store.add_documents(documents, ids=[str(d.id) for d in documents])
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


def settled_answer(
    rag: RagRunnable, question: str, builds_pending: Callable[[], int]
) -> dict[str, Any]:
    """An answer of an engine at rest: fused or read from the tree, sums round otherwise."""
    deadline = time.monotonic() + 120
    last: dict[str, Any] = {}
    while True:
        answer: dict[str, Any] = rag.invoke(question)
        if not builds_pending() and answer["rag"]["usage"] == last:
            return answer
        assert time.monotonic() < deadline, answer
        last = answer["rag"]["usage"]


def test_answer_with_sources_in_every_way(
    model: ChatSGLangRag,
    retriever: Any,
    sum_of_kinds: Callable[[dict[str, Any]], int],
    builds_pending: Callable[[], int],
) -> None:
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

    whole = settled_answer(rag, question, builds_pending)
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
