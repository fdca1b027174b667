"""The routes that answer and search: plain, as a stream, through the OpenAI client; health and the page."""

from __future__ import annotations

import json
import time
from typing import Any

import httpx
import openai
import pytest
from langchain_openai import ChatOpenAI
from rag_bodies import FIND, QUESTION, chat

from rag_pipeline.server.page import FILES

pytestmark = pytest.mark.engine


def details(answer: dict[str, Any]) -> dict[str, int]:
    found: dict[str, int] = answer["usage"]["prompt_tokens_details"]
    return found


def adds_up(answer: dict[str, Any]) -> bool:
    kinds = details(answer)
    total = sum(
        kinds[f"{kind}_tokens"] for kind in ("exact_prefix", "reused", "recomputed", "fresh")
    )
    return total == answer["usage"]["prompt_tokens"]


def events_of(text: str) -> list[dict[str, Any]]:
    lines = [line for line in text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_answer_with_citations_and_an_account_of_the_prompt(rag_server: Any) -> None:
    body = chat(rag={"k": 3, "search": "bm25", "policy": "prefix"})
    first = rag_server.post("/v1/rag/chat/completions", body).json()
    assert first["object"] == "chat.completion"
    assert first["choices"][0]["message"]["role"] == "assistant"
    assert first["choices"][0]["finish_reason"] in ("stop", "length")
    citations = first["rag"]["citations"]
    assert [item["number"] for item in citations] == [1, 2, 3]
    assert all(item["text"] and item["title"] for item in citations)
    edges = [edge for item in citations for edge in item["tokens"]]
    assert edges == sorted(edges)
    assert adds_up(first)
    runs = first["rag"]["segments"]["runs"]
    assert runs[0]["start"] == 0
    assert runs[-1]["end"] == first["usage"]["prompt_tokens"]
    assert not first["rag"]["fused"]
    # Asked again, the radix tree has all but the last token or so, and the answer is the same.
    again = rag_server.post("/v1/rag/chat/completions", body).json()
    assert again["choices"] == first["choices"]
    assert adds_up(again)
    assert details(again)["exact_prefix_tokens"] > 0.9 * again["usage"]["prompt_tokens"]
    assert details(again)["cached_tokens"] == details(again)["exact_prefix_tokens"]


def test_chunks_seen_before_are_reused_in_another_order(rag_server: Any) -> None:
    """The engine stores chunks of earlier prompts when idle; a prompt that mixes them reuses them."""
    ask = "/v1/rag/chat/completions"
    topics = ("while statement loop", "lambda expression parameters")
    for topic in topics:
        body = chat(topic, rag={"k": 2, "search": "bm25", "policy": "query"})
        assert rag_server.post(ask, body).status_code == 200
    rag_server.wait_idle()
    deadline = time.monotonic() + 240
    mixed = chat("lambda while", rag={"k": 6, "search": "bm25", "policy": "query:0.2"})
    while True:
        answer = rag_server.post(ask, mixed).json()
        assert adds_up(answer)
        if answer["rag"]["fused"]:
            break
        assert time.monotonic() < deadline, answer["rag"]
        time.sleep(1)
        rag_server.wait_idle()
    assert details(answer)["reused_tokens"] > 0
    assert (answer["rag"]["policy"], answer["rag"]["attention"]) == ("query", "dense")
    assert 0 < answer["rag"]["computed_fraction"] < 1
    assert details(answer)["cached_tokens"] == (
        details(answer)["exact_prefix_tokens"] + details(answer)["reused_tokens"]
    )
    kinds = {run["kind"] for run in answer["rag"]["segments"]["runs"]}
    assert kinds & {"reused", "mixed"}


def test_stream_is_openais_with_sources_first(rag_server: Any) -> None:
    body = chat(stream=True, stream_options={"include_usage": True}, rag={"policy": "prefix"})
    with rag_server.client() as client:
        answer = client.post("/v1/rag/chat/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = events_of(answer.text)
    assert events[0]["choices"][0]["delta"]["role"] == "assistant"
    assert len(events[0]["rag"]["citations"]) == 4
    text = "".join(
        e["choices"][0]["delta"].get("content", "") for e in events if e["choices"] and e["choices"]
    )
    assert events[-2]["choices"][0]["finish_reason"] in ("stop", "length")
    assert events[-2]["rag"]["segments"]["runs"]
    assert events[-1]["choices"] == []
    assert adds_up(events[-1])
    whole = rag_server.post("/v1/rag/chat/completions", chat(rag={"policy": "prefix"})).json()
    assert text.rstrip() == whole["choices"][0]["message"]["content"]


def test_an_openai_client_talks_to_it_unchanged(rag_server: Any) -> None:
    client = openai.OpenAI(
        base_url=f"{rag_server.url}/v1/rag", api_key=rag_server.keys["operator"], max_retries=0
    )
    asked: Any = {
        "model": "any",
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": 6,
        "temperature": 0,
    }
    whole = client.chat.completions.create(**asked, extra_body={"rag": {"k": 2}})
    assert whole.usage is not None
    assert whole.usage.prompt_tokens > 50
    assert len(whole.model_extra["rag"]["citations"]) == 2
    pieces = list(
        client.chat.completions.create(
            **asked,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"rag": {"k": 2}},
        )
    )
    assert pieces[-1].usage is not None
    # What a client does next: list the models, send the answer back, fill in the neutral fields.
    (listed,) = client.models.list().data
    assert client.models.retrieve(listed.id).id == listed.id
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-9")
    history = [*asked["messages"], whole.choices[0].message.model_dump(), *asked["messages"]]
    neutral: Any = {"n": 1, "seed": 1, "logprobs": False, "response_format": {"type": "text"}}
    more = client.chat.completions.create(**{**asked, "messages": history, **neutral})
    assert more.usage is not None
    assert more.usage.prompt_tokens > whole.usage.prompt_tokens
    chain = ChatOpenAI(
        base_url=str(client.base_url), api_key=client.api_key, model=listed.id, max_tokens=4
    )
    first = chain.invoke([("user", QUESTION)])
    again = chain.invoke([("user", QUESTION), first, ("user", QUESTION)])
    assert again.usage_metadata["output_tokens"]
    assert "".join(piece.text for piece in chain.stream(QUESTION)) == first.text
    with pytest.raises(openai.BadRequestError, match=r"rag\.kk is not known here"):
        client.chat.completions.create(**asked, extra_body={"rag": {"kk": 2}})
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{rag_server.url}/v1/rag", api_key="wrong").chat.completions.create(
            **asked
        )


def test_a_closed_connection_ends_the_request(rag_server: Any) -> None:
    body = chat(stream=True, max_tokens=1200, temperature=1.0)
    with rag_server.client() as client:
        with client.stream("POST", "/v1/rag/chat/completions", json=body) as answer:
            next(answer.iter_lines())
        # 1,200 tokens would take far longer than it takes to come to rest.
        rag_server.wait_idle()
    with rag_server.client("acme") as client:
        assert client.get("/v1/rag/health").json()["status"] == "ok"


@pytest.mark.parametrize("search", ["dense", "bm25", "hybrid"])
def test_search(rag_server: Any, search: str) -> None:
    body = {"query": "lambda expressions", "k": 3, "search": search}
    found = rag_server.post(FIND, body).json()
    assert found["index"] == "topics"
    assert found["data"][0]["document_id"] == "lambda"
    scores = [item["score"] for item in found["data"]]
    assert scores == sorted(scores, reverse=True)


def test_health_tells_activation_gate_index_and_cache(rag_server: Any) -> None:
    with rag_server.client() as client:
        answer = client.get("/v1/rag/health")
    assert answer.status_code == 200
    health = answer.json()
    # The operator is told of a tenant's damaged index, and of nothing else.
    assert all(line.startswith("tenant broken, index hurt") for line in health["problems"])
    assert health["activation"]["active"]
    assert health["activation"]["unapplied"] == []
    assert health["gate"]["on"]
    assert health["gate"]["self_check"].startswith("passed")
    assert health["gate"]["model"]["status"] == "none"
    assert health["index"]["topics"]["documents"] == 4
    assert health["index"]["extra"] is not None
    assert health["cache"]["store"]["byte_budget"] > 0
    assert rag_server.keys["operator"] not in answer.text


def test_the_page_needs_no_key_and_lets_nothing_in(rag_server: Any) -> None:
    for path in FILES:
        answer = httpx.get(f"{rag_server.url}{path}", trust_env=False)
        assert answer.status_code == 200
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        same = httpx.get(
            f"{rag_server.url}{path}",
            headers={"If-None-Match": answer.headers["etag"]},
            trust_env=False,
        )
        assert same.status_code == 304
        assert "http://" not in answer.text
        assert "https://" not in answer.text
    for path in ("/rag/../server_info", "/rag/x", "/rag/rag.js/x", "/rag/%2e%2e/server_info"):
        found = httpx.get(f"{rag_server.url}{path}", trust_env=False).status_code
        assert found in (401, 404)


def test_a_chat_past_the_context_loses_its_oldest_turns_and_says_so(rag_server: Any) -> None:
    ask = "/v1/rag/chat/completions"
    said = [
        {"role": role, "content": f"{role} {turn} " + "word " * 200}
        for turn in range(30)
        for role in ("user", "assistant")
    ]
    rules = {"role": "system", "content": "Be brief."}
    options = {"k": 2, "search": "bm25", "policy": "prefix"}
    body = chat(rag=options)
    body["messages"] = [rules, *said, *body["messages"]]
    answer = rag_server.post(ask, body)
    assert answer.status_code == 200, answer.text
    cut = answer.json()["rag"]["truncated"]
    assert 0 < cut["turns"] < 30
    assert cut["tokens"] > 400 * cut["turns"]
    assert len(answer.json()["rag"]["citations"]) == 2
    assert adds_up(answer.json())
    body["rag"] = options | {"truncation": "disabled"}
    refused = rag_server.post(ask, body)
    assert refused.status_code == 400
    assert "does not fit" in refused.json()["error"]["message"]
    short = rag_server.post(ask, chat(rag=options)).json()
    assert short["rag"]["truncated"] == {"turns": 0, "tokens": 0}
