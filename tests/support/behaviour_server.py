"""The part of :mod:`behaviour` that asks a server with an index, over HTTP and through every client."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx


def without_times(value: Any) -> Any:
    """The same without what differs between two runs: times, names of requests."""
    if isinstance(value, dict):
        gone = (
            "timing",
            "id",
            "created",
            "e2e_latency",
            "request_received_ts",
            "response_sent_to_client_ts",
        )
        return {key: without_times(item) for key, item in value.items() if key not in gone}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def served_part(model: Path, scratch: Path) -> dict[str, Any]:
    """A server with an index: ``/generate``, chat with documents, OpenAI's routes, the backend by URL, LangChain."""
    from rag_eval.benchmarks.load_server import started_server
    from rag_pipeline import RagPipeline, SamplingOptions, ServerBackend
    from retrievers import Index

    found: dict[str, Any] = {}
    with started_server(str(model), scratch / "server") as target:
        headers = {"Authorization": f"Bearer {target.operator_key}"}
        key = next(iter(target.tenants.values()))
        with httpx.Client(base_url=target.url, timeout=300, trust_env=False) as client:

            def post(path: str, body: Any, key: str = target.operator_key) -> Any:
                answer = client.post(path, json=body, headers={"Authorization": f"Bearer {key}"})
                assert answer.status_code == 200, answer.text
                if "text/event-stream" not in answer.headers["content-type"]:
                    return without_times(answer.json())
                lines = [
                    line[6:] for line in answer.text.splitlines() if line.startswith("data: {")
                ]
                return [without_times(json.loads(line)) for line in lines]

            def settle() -> None:
                """Until the chunks that were missing are computed, and the tree is empty."""
                deadline = time.monotonic() + 120
                while True:
                    states = client.get("/server_info", headers=headers).json()["internal_states"]
                    waiting = sum(
                        int((s.get("rag_fusion") or {}).get("pending", 0)) for s in states
                    )
                    if (
                        not waiting
                        and client.post("/flush_cache", headers=headers).status_code == 200
                    ):
                        return
                    assert time.monotonic() < deadline, "the server does not come to rest"
                    time.sleep(0.2)

            def twice(ask: Callable[[], Any]) -> Any:
                """Ask until all chunks are there, then once more from an empty tree."""
                ask()
                settle()
                return ask()

            chat = {"messages": [{"role": "user", "content": "What does the with statement do?"}]}
            for name, rag in (
                ("query", {"k": 3}),
                ("cacheblend", {"k": 3, "policy": "cacheblend", "ratio": 0.2}),
                ("prefix", {"k": 3, "policy": "prefix"}),
            ):
                for stream in (False, True):
                    body = {**chat, "max_tokens": 12, "rag": rag, "stream": stream}
                    found[f"chat {name} {stream}"] = twice(
                        lambda body=body: post("/v1/rag/chat/completions", body, key)
                    )
                    settle()
            found["search"] = post("/v1/rag/search", {"query": "lambda", "k": 3}, key)
            found |= _clients(model, target, key, scratch, twice, settle)
            found["pipeline"] = []
            backend = ServerBackend(target.url, api_key=key)
            index = Index.open(scratch / "server" / "north").retriever("bm25")
            with RagPipeline(index, backend, model, top_k=3) as pipeline:
                for policy in ("query", "reuse"):

                    def ask(policy: str = policy) -> Any:
                        return pipeline.ask(
                            "What is a lambda?",
                            policy=policy,
                            sampling=SamplingOptions(max_new_tokens=12),
                        ).to_json()

                    found["pipeline"].append(without_times(twice(ask)))
                    settle()
    return found


def _clients(
    model: Path,
    target: Any,
    key: str,
    scratch: Path,
    twice: Callable[[Callable[[], Any]], Any],
    settle: Callable[[], None],
) -> dict[str, Any]:
    """LangChain's chat model and runnable, and a frontend program, on the running server."""
    import pydoc_data.topics

    import sglang as sgl
    from langchain_core.documents import Document
    from langchain_core.messages import HumanMessage

    from rag_pipeline import frontend
    from rag_pipeline.langchain import ChatSGLangRag, RagRetriever, RagRunnable

    found: dict[str, Any] = {}
    chat = ChatSGLangRag(
        base_url=f"{target.url}/v1", api_key=key, tokenizer=str(model), max_tokens=12
    )
    documents = [
        Document(
            id=name, page_content=pydoc_data.topics.topics[name][:600], metadata={"title": name}
        )
        for name in ("for", "try", "assert")
    ]

    def invoke() -> Any:
        message = chat.invoke([HumanMessage("What is it for?")], documents=documents)
        return [message.content, without_times(message.response_metadata["rag"])]

    def stream() -> Any:
        whole: Any = None
        for piece in chat.stream([HumanMessage("What is it for?")], documents=documents):
            whole = piece if whole is None else whole + piece
        return [whole.content, without_times(whole.response_metadata["rag"])]

    found["langchain invoke"] = twice(invoke)
    settle()
    found["langchain stream"] = stream()
    settle()
    retriever = RagRetriever.from_index(scratch / "server" / "north", k=3)
    runnable = RagRunnable(retriever=retriever, llm=chat)
    found["langchain runnable"] = twice(
        lambda: without_times(
            json.loads(json.dumps(runnable.invoke("What is a while loop?"), default=str))
        )
    )
    settle()
    backend = frontend.RagEndpoint(
        target.url, key, tokenizer=model, policy="query", build_missing=True
    )

    @sgl.function
    def program(s: Any) -> None:
        s += "Texts:\n"
        s += frontend.chunks(documents)
        s += "\nIn one word, it is"
        s += sgl.gen("word", max_tokens=6, temperature=0)

    def run() -> Any:
        state = program.run(backend=backend)
        return [state["word"], without_times(state.get_meta_info("word").get("rag_fusion"))]

    found["program"] = twice(run)
    settle()
    return found
