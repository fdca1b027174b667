"""Every malformed request is refused with one line that says what is allowed."""

from __future__ import annotations

from typing import Any

import pytest
from rag_bodies import ASK, FIND, chat

pytestmark = pytest.mark.engine


MALFORMED: list[tuple[str, Any, str]] = [
    (ASK, {}, "messages is missing"),
    (ASK, {"messages": []}, "messages is []"),
    (ASK, {"messages": [{"role": "user", "content": " "}]}, "at least one word"),
    (ASK, {"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role is 'robot'"),
    (ASK, {"messages": [{"role": "assistant", "content": "x"}]}, "must be the user's"),
    (ASK, chat(rag={"k": 0}), "rag.k is 0"),
    (ASK, chat(rag={"k": 65}), "rag.k is 65"),
    (ASK, chat(rag={"k": "4"}), "rag.k is '4'"),
    (ASK, chat(rag={"nonsense": 1}), "rag.nonsense is not known here"),
    (ASK, chat(rag={"policy": "magic"}), "policy 'magic' is unknown"),
    (ASK, chat(rag={"policy": "prefix", "ratio": 0.5}), "takes no ratio"),
    (ASK, chat(rag={"policy": "query", "ratio": 1.5}), "rag.ratio is 1.5"),
    (ASK, chat(rag={"policy": "query", "attention": "magic"}), "attention method 'magic'"),
    (ASK, chat(rag={"policy": "prefix", "attention": "edges"}), "attention 'edges' is not"),
    (ASK, chat(rag={"policy": "prefix", "conversation": "c"}), "which keeps no turns"),
    (ASK, chat(rag={"search": "psychic"}), "rag.search is 'psychic'"),
    (ASK, chat(rag={"where": {"$near": 1}}), "$near"),
    (ASK, chat(rag={"index": "../../etc"}), "rag.index is '../../etc'"),
    (ASK, chat(temperature=-1), "temperature is -1"),
    (ASK, chat(max_tokens=0), "max_tokens is 0"),
    (ASK, chat(max_tokens=100_000), "does not fit"),
    (ASK, chat("word " * 6000), "does not fit"),
    (ASK, chat("word " * 30_000), "characters, of at most 32 per token"),
    (ASK, chat(tools=[{"type": "function"}]), "tools is [{'type': 'function'}]: it cannot be"),
    (ASK, chat(nonsense=1), "nonsense is not known here"),
    (ASK, chat(n=3), "n is 3"),
    (ASK, chat(stream_options={"include_usage": True}), "set stream to true"),
    (ASK, [1, 2], "one JSON object"),
    (ASK, "text", "one JSON object"),
    (FIND, {}, "query is missing"),
    (FIND, {"query": ""}, "query is ''"),
    (FIND, {"query": " \n"}, "query is blank; give at least one word"),
    (FIND, {"query": "x", "k": 10**30}, "k is"),
    (FIND, {"query": "x", "where": []}, "where is []"),
]


@pytest.mark.parametrize(("path", "body", "line"), MALFORMED)
def test_malformed_requests_get_400_and_one_line(
    rag_server: Any, path: str, body: Any, line: str
) -> None:
    answer = rag_server.post(path, body)
    assert answer.status_code == 400, answer.text
    assert rag_server.is_one_line(answer)
    assert line in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b"{", "application/json", 400),
        (b"", "application/json", 400),
        (b"\xff\xfe", "application/json", 400),
        (b'{"messages": NaN}', "application/json", 400),
        (b"[" * 200_000, "application/json", 400),
        (b'{"messages":[{"role":"user","content":"\\ud800"}]}', "application/json", 400),
        (b"a=b", "application/x-www-form-urlencoded", 400),
        (b"x" * (2 << 20), "application/json", 413),
    ],
)
def test_bodies_that_are_no_json(rag_server: Any, content: bytes, kind: str, status: int) -> None:
    with rag_server.client() as client:
        answer = client.post(ASK, content=content, headers={"Content-Type": kind})
    assert answer.status_code == status, answer.text
    assert rag_server.is_one_line(answer)


def test_a_body_without_a_length_is_bounded_too(rag_server: Any) -> None:
    def pieces() -> Any:
        for _ in range(40):
            yield b"x" * (1 << 16)

    with rag_server.client() as client:
        answer = client.post(ASK, content=pieces(), headers={"Content-Type": "application/json"})
    assert answer.status_code == 413
    assert rag_server.is_one_line(answer)


def test_unknown_index_and_empty_index(rag_server: Any) -> None:
    unknown = rag_server.post(ASK, chat(rag={"index": "nowhere"}))
    assert unknown.status_code == 404
    assert "this key has topics, extra" in unknown.json()["error"]["message"]
    empty = rag_server.post(ASK, chat(rag={"index": "extra"}))
    assert empty.status_code == 409
    assert "upload documents" in empty.json()["error"]["message"]
    assert rag_server.is_one_line(empty)


@pytest.mark.parametrize(
    ("method", "path", "status", "line"),
    [
        ("GET", "/v1/rag/serch", 404, "no route GET '/v1/rag/serch' here"),
        ("GET", "/nowhere", 404, "no route GET '/nowhere' here"),
        ("PATCH", "/generate", 405, "no PATCH '/generate' here; the route takes other methods"),
        ("DELETE", FIND, 405, f"no DELETE '{FIND}' here; the route takes other methods"),
    ],
)
def test_a_path_or_a_method_that_is_not_there(
    rag_server: Any, method: str, path: str, status: int, line: str
) -> None:
    with rag_server.client() as client:
        answer = client.request(method, path)
    assert answer.status_code == status
    assert answer.json()["error"]["message"] == line
    assert ("allow" in answer.headers) == (status == 405)
