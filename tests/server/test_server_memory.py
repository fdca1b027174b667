"""Long conversations answered from a memory, over HTTP: SGLang's own chat route and the RAG route, with tenants."""

from __future__ import annotations

import json
import time
from typing import Any

import httpx
import pytest
from langchain_core.messages import convert_to_messages

from rag_pipeline.langchain import ChatSGLangRag

pytestmark = pytest.mark.engine

STOCK, RAG, CACHE = "/v1/chat/completions", "/v1/rag/chat/completions", "/v1/rag/cache"
BUDGET, BLOCK = 128, 32
RECORD = BUDGET // 2  # the rest is for messages near the question
MEMORY = {"method": "epicache", "budget_tokens": BUDGET, "episodes": 2, "block_tokens": BLOCK}
TOPICS = ("the lighthouse", "a violin", "my garden", "the night train")


def talk(turns: int) -> list[dict[str, str]]:
    """So many turns of about forty tokens, with a question behind them."""
    messages = [{"role": "system", "content": "Be brief."}]
    for turn in range(turns):
        topic = TOPICS[turn // 3 % len(TOPICS)]
        messages += [
            {"role": "user", "content": f"Note {turn}: tell me something about {topic}, please."},
            {
                "role": "assistant",
                "content": f"Gladly. Of {topic} one says in year {turn} that it was blue and old.",
            },
        ]
    return [*messages, {"role": "user", "content": "What did I say about the lighthouse?"}]


def ask(server: Any, tenant: str = "operator", **body: Any) -> dict[str, Any]:
    answer = server.post(STOCK, {"model": "default", "max_tokens": 4, **body}, tenant)
    assert answer.status_code == 200, answer.text
    return answer.json()


def facts(server: Any, tenant: str = "operator") -> dict[str, Any]:
    with server.client(tenant) as client:
        return client.get(CACHE).json()["memory"]


def built(server: Any, tenant: str = "operator") -> None:
    """Wait until the builds behind the answers have come to rest."""
    deadline, before = time.monotonic() + 120, -1
    while (steps := facts(server, tenant).get("build_steps", 0)) != before:
        assert time.monotonic() < deadline
        before = steps
        time.sleep(0.5)


def test_a_growing_chat_is_answered_from_prompts_of_one_size(rag_server: Any) -> None:
    lengths, loaded = [], []
    for turns in (3, 8, 9, 16, 32):
        answer = ask(rag_server, messages=talk(turns), memory=MEMORY, return_meta_info=True)
        lengths.append(answer["usage"]["prompt_tokens"])
        report = answer["choices"][0]["meta_info"].get("rag_fusion", {})
        loaded.append(report.get("memory", {}).get("loaded", 0))
    whole = ask(rag_server, messages=talk(32))["usage"]["prompt_tokens"]
    assert loaded[0] == 0
    assert loaded[1:] == [RECORD] * 4
    assert whole > 1000
    assert max(lengths) < BUDGET + 2 * BLOCK + 60
    told = facts(rag_server)
    assert told["loaded"] >= 4
    assert told["missed"] == 0
    assert told["build_forward_tokens"] > 0


def test_a_stream_has_the_same_prompt_and_says_its_usage(rag_server: Any) -> None:
    body = {"model": "default", "max_tokens": 4, "messages": talk(8), "memory": MEMORY}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    with rag_server.client() as client, client.stream("POST", STOCK, json=body) as response:
        assert response.status_code == 200
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    usage = json.loads(lines[-2])["usage"]
    answer = ask(rag_server, messages=talk(8), memory=MEMORY)
    assert usage["prompt_tokens"] == answer["usage"]["prompt_tokens"] < BUDGET + 2 * BLOCK + 60
    assert 1 <= usage["completion_tokens"] <= 4


def test_a_chat_without_a_memory_has_all_of_it_in_its_prompt(rag_server: Any) -> None:
    """That the request is stock's to the byte, its own test shows; a build beside it may round its answer otherwise."""

    def prompt(turns: int, **fields: Any) -> int:
        return ask(rag_server, messages=talk(turns), **fields)["usage"]["prompt_tokens"]

    assert prompt(8) == prompt(8, memory="off") > 300
    assert prompt(2) == prompt(2, memory=MEMORY)


def test_the_rag_route_answers_from_documents_and_the_memory(rag_server: Any) -> None:
    body = {"messages": talk(16), "max_tokens": 4, "rag": {"k": 1, "memory": MEMORY}}
    answer = rag_server.post(RAG, body)
    assert answer.status_code == 200, answer.text
    told = answer.json()["rag"]
    assert told["memory"]["loaded"] == told["memory"]["slots"] == RECORD
    assert told["memory"]["missed"] == 0
    assert told["memory"]["history_tokens"] > 500
    usage = answer.json()["usage"]
    details = usage["prompt_tokens_details"]
    kinds = ("exact_prefix", "reused", "recomputed", "fresh")
    assert sum(details[f"{kind}_tokens"] for kind in kinds) == usage["prompt_tokens"]
    start, end = told["citations"][0]["tokens"]
    assert RECORD < start < end < usage["prompt_tokens"]
    # A short one has its chunk where it always stands.
    body["messages"] = talk(1)
    assert "memory" not in rag_server.post(RAG, body).json()["rag"]


@pytest.mark.parametrize(
    ("path", "fields", "named"),
    [
        (STOCK, {"memory": "elephant"}, "elephant"),
        (STOCK, {"memory": {"budget": 5}}, "'budget' is not known"),
        (STOCK, {"memory": {"budget_tokens": 5}}, "budget_tokens is 5"),
        (STOCK, {"memory": {"budget_tokens": 2040}}, "lower budget_tokens or block_tokens"),
        (RAG, {"rag": {"memory": "elephant"}}, "elephant"),
        (RAG, {"rag": {"memory": {"budget": 5}}}, "budget"),
        (RAG, {"rag": {"memory": "epicache", "conversation": "c"}}, "leave one out"),
        (RAG, {"rag": {"memory": "epicache", "policy": "prefix"}}, "leave one out"),
    ],
)
def test_a_memory_that_cannot_be_is_refused_in_one_line(
    path: str, fields: dict[str, Any], named: str, rag_server: Any
) -> None:
    body = {"model": "default", "messages": talk(40), "max_tokens": 4, **fields}
    refusal = rag_server.post(path, body)
    assert refusal.status_code == 400, refusal.text
    error = refusal.json()
    message = error.get("error", error)["message"]
    assert named in message
    assert "\n" not in message


def test_a_tenants_memory_is_its_own(rag_server: Any) -> None:
    """Records of one tenant are not found by another, and each sees its own figures."""
    for tenant in ("acme", "globex"):
        answer = ask(rag_server, tenant, messages=talk(10), memory=MEMORY, return_meta_info=True)
        memory = answer["choices"][0]["meta_info"]["rag_fusion"]["memory"]
        assert (memory["loaded"], memory["missed"]) == (RECORD, 0)
        built(rag_server, tenant)
    acme, globex = (facts(rag_server, tenant) for tenant in ("acme", "globex"))
    assert acme["answers"] == globex["answers"] == 1
    assert acme["build_steps"] == globex["build_steps"] > 0
    assert "left_alone" not in acme
    assert facts(rag_server)["answers"] > 2


def own_talk(turns: int, mark: str) -> list[dict[str, str]]:
    """A conversation that no other test has."""
    _, *others = talk(turns)
    return [{"role": "system", "content": f"Be brief, {mark}."}, *others]


def loaded(server: Any, messages: list[dict[str, str]]) -> int:
    """Slots that an answer was made from."""
    answer = ask(server, messages=messages, memory=MEMORY, return_meta_info=True)
    return int(answer["choices"][0]["meta_info"]["rag_fusion"]["memory"]["loaded"])


def test_a_client_that_leaves_while_its_record_is_made_harms_nobody(rag_server: Any) -> None:
    messages = own_talk(40, "leaver")
    body = {"model": "default", "max_tokens": 4, "messages": messages, "memory": MEMORY}
    before = facts(rag_server)
    with rag_server.client() as client, pytest.raises(httpx.ReadTimeout):
        client.post(STOCK, json=body, timeout=0.3)
    # It left while the answer waited for its record.
    assert facts(rag_server)["answers"] == before["answers"]
    assert loaded(rag_server, own_talk(10, "stayer")) == RECORD
    assert loaded(rag_server, messages) == RECORD
    built(rag_server)
    after = facts(rag_server)
    assert after.get("build_failed", 0) == before.get("build_failed", 0)
    rag_server.wait_idle()  # no slot of the pool is held, or the tree could not be emptied


def test_an_answer_is_aborted_by_its_rid_and_the_next_one_is_made(rag_server: Any) -> None:
    messages = own_talk(20, "aborter")
    assert loaded(rag_server, messages) == RECORD
    body = {"model": "default", "max_tokens": 1500, "messages": messages, "memory": MEMORY}
    body |= {"stream": True, "rid": "of-the-aborter", "ignore_eos": True}
    with rag_server.client() as client, client.stream("POST", STOCK, json=body) as response:
        assert response.status_code == 200
        lines = (line for line in response.iter_lines() if line)
        first = next(lines)
        rag_server.post("/abort_request", {"rid": "of-the-aborter"})
        rest = list(lines)
    assert first.startswith("data: ")
    assert len(rest) < 1500
    assert loaded(rag_server, messages) == RECORD
    rag_server.wait_idle()


def test_langchain_answers_from_the_memory_whole_and_in_a_stream(rag_server: Any) -> None:
    key = rag_server.keys["operator"]
    model = ChatSGLangRag(
        base_url=f"{rag_server.url}/v1", api_key=key, max_tokens=4, stream_usage=True
    )
    messages = convert_to_messages(own_talk(20, "chain"))
    told = model.invoke(messages, memory=MEMORY).response_metadata["rag"]
    assert (told["memory"]["loaded"], told["memory"]["missed"]) == (RECORD, 0)
    assert told["usage"]["prompt_tokens"] < BUDGET + 2 * BLOCK + 60
    whole: Any = None
    for piece in model.stream(messages, memory=MEMORY):
        whole = piece if whole is None else whole + piece
    # SGLang's chat route reports nothing of its own in a stream, but how long the prompt was.
    assert whole.usage_metadata["input_tokens"] == told["usage"]["prompt_tokens"]
    plain = model.invoke(messages, memory="off").response_metadata["rag"]
    assert "memory" not in plain
    assert plain["usage"]["prompt_tokens"] > 600
