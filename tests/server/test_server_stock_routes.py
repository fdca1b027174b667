"""SGLang's own routes on a server of ours: what they were not written for is refused in one line, and hurts nobody."""

from __future__ import annotations

import json
import logging
import math
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from fastapi import Depends, FastAPI
from fastapi.responses import StreamingResponse
from fastapi.testclient import TestClient
from guarded import guard

from rag_pipeline.server import stock_faults
from rag_pipeline.server.stock_faults import answer_stock_fault

pytestmark = pytest.mark.engine

CHAT = "/v1/chat/completions"
ASKED = [{"role": "user", "content": "x"}]
NONE = {"max_new_tokens": 0}
DEEP = b"[" * 20_000 + b"]" * 20_000


def send(server: Any, path: str, content: bytes, kind: str = "application/json") -> Any:
    with server.client() as client:
        return client.post(path, content=content, headers={"Content-Type": kind})


def is_well(server: Any) -> bool:
    with server.client() as client:
        return bool(client.get("/v1/rag/health").json()["activation"]["active"])


@pytest.mark.parametrize(
    ("path", "content"),
    [
        (CHAT, b"null"),
        (CHAT, b"[1]"),
        (CHAT, DEEP),
        (CHAT, b'{"response_format": 1e308}'),
        ("/generate", b"[]"),
        ("/generate", b'{"text": "x", "sampling_params": {"stop_regex": "("}}'),
        ("/generate", b'{"text": "x", "rid": ["a", "b"]}'),
        ("/generate", b'{"input_embeds": []}'),
        ("/encode", b'{"input_ids": []}'),
        ("/invocations", b'"x"'),
        ("/parse_function_call", b'{"text": "x"}'),
        ("/add_external_corpus", b"{"),
        ("/add_external_corpus", b"[1e999]"),
        ("/remove_external_corpus", b"[]"),
        ("/remove_external_corpus", b"\xff\xfe\x00"),
        ("/scale_elastic_ep", DEEP),
        ("/stop_profile", b""),
    ],
)
def test_what_a_route_was_not_written_for(rag_server: Any, path: str, content: bytes) -> None:
    answer = send(rag_server, path, content)
    assert answer.status_code == 400, answer.text
    assert "\n" not in answer.text
    # uvicorn's word for what nobody caught.
    assert "Exception in ASGI" not in rag_server.log.read_text(errors="replace")


def test_a_body_that_is_called_something_else(rag_server: Any) -> None:
    answer = send(rag_server, CHAT, b'{"response_format": {"type": "text"}}', "text/plain")
    assert answer.status_code == 400, answer.text


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"text": ""}),
        ("/generate", {"text": [""]}),
        ("/generate", {"text": ["x", ""]}),
        ("/generate", {"text": "x", "input_ids": []}),
        ("/generate", {"input_ids": [[], []]}),
        ("/generate", {"text": "", "sampling_params": {"max_new_tokens": 0}}),
        ("/generate", {"text": "", "stream": True}),
        ("/v1/completions", {"model": "m", "prompt": ["x", ""]}),
        ("/vertex_generate", {"instances": [{"text": ""}]}),
        ("/generate", {"input_ids": [10**6]}),
        ("/generate", {"input_ids": [3, -1]}),
        ("/generate", {"input_ids": [[1], [2**40]]}),
        ("/v1/completions", {"model": "m", "prompt": [49152]}),
        (CHAT, {"model": "m", "messages": ASKED, "input_ids": [10**6]}),
        ("/generate", {"text": "x", "sampling_params": {"top_k": 2**40}}),
        ("/generate", {"text": "x", "return_logprob": True, "top_logprobs_num": 10**6}),
        ("/generate", {"text": "x", "return_logprob": True, "top_logprobs_num": -1}),
        ("/generate", {"text": "x", "return_logprob": True, "logprob_start_len": -5}),
        ("/generate", {"text": "x", "positional_embed_overrides": [1]}),
        (
            "/generate",
            {"text": "x", "sampling_params": {"stop_token_ids": [10**6], "min_new_tokens": 1}},
        ),
        ("/generate", {"text": "x", "sampling_params": {"stop_token_ids": [-1]}}),
        (
            "/generate",
            {"text": "x", "sampling_params": {"min_new_tokens": 2**40, "max_new_tokens": None}},
        ),
        ("/generate", {"text": "x", "sampling_params": {"logit_bias": {"3": math.inf}}}),
        ("/generate", {"text": "x", "sampling_params": {"logit_bias": {"3": 1e38}}}),
        ("/generate", {"text": "x", "token_indices_to_pool": [10**6], "sampling_params": NONE}),
        ("/generate", {"text": "x", "token_indices_to_pool": [], "sampling_params": NONE}),
        ("/generate", {"text": "x", "session_params": {"id": []}}),
        (CHAT, {"model": "m", "messages": ASKED, "stop_token_ids": [10**6], "min_tokens": 1}),
        (CHAT, {"model": "m", "messages": ASKED, "logit_bias": {"3": 1e38}}),
        ("/v1/completions", {"model": "m", "prompt": "x", "logprobs": 10**6}),
        (CHAT, {"model": "m", "messages": ASKED, "logprobs": True, "top_logprobs": 10**6}),
        ("/v1/score", {"model": "m", "query": "", "items": [""], "label_token_ids": [1]}),
    ],
)
def test_what_the_scheduler_would_die_of_is_refused(rag_server: Any, path: str, body: Any) -> None:
    """Behind it nobody was answered any more; a tenant's key was enough for most."""
    content = json.dumps(body).replace("Infinity", "1e999").encode()
    answer = send(rag_server, path, content)
    if body.get("stream"):  # begun when its prompt is read: its one event holds the error
        events = [line for line in answer.text.splitlines() if line.startswith("data: {")]
        assert [json.loads(event[6:])["error"]["code"] for event in events] == [400], answer.text
    else:
        assert answer.status_code == 400, answer.text
    ordinary = {"text": "One", "sampling_params": {"max_new_tokens": 1}}
    assert rag_server.post("/generate", ordinary).status_code == 200


def test_an_empty_prompt_in_ollamas_words(rag_server: Any) -> None:
    """It means that the model is to be loaded."""
    answer = rag_server.post("/api/generate", {"model": "m", "prompt": "", "stream": False})
    assert answer.status_code in (200, 400), answer.text
    assert is_well(rag_server)


@pytest.mark.parametrize(
    "fields",
    [
        {"session_params": {"id": "of-somebody"}},
        {"sampling_params": {"stop_regex": "(a+)+b"}},
    ],
)
def test_what_reaches_others_is_the_operators(rag_server: Any, fields: Any) -> None:
    refused = rag_server.post("/generate", {"text": "One", **fields}, "acme")
    assert refused.status_code == 400, refused.text
    assert "the operator's" in refused.text


def faulty_app() -> FastAPI:
    app = FastAPI()

    def unreadable() -> None:
        raise TypeError("no dependency takes this")

    @app.post("/generate")
    def generate() -> None:
        raise KeyError("a fault of the server")

    @app.post(CHAT, dependencies=[Depends(unreadable)])
    async def chat() -> None: ...

    @app.post("/v1/completions")
    async def complete() -> StreamingResponse:
        async def pieces() -> AsyncIterator[bytes]:
            yield b"one"
            raise KeyError("a fault of the server")

        return StreamingResponse(pieces())

    @app.post("/flush_cache")
    async def flush() -> None:
        raise type("OutOfMemoryError", (RuntimeError,), {})("a fault of the server")

    app.add_exception_handler(Exception, answer_stock_fault)
    return app


@pytest.mark.parametrize(
    ("path", "status"),
    [("/generate", 500), (CHAT, 400), ("/v1/completions", 200), ("/flush_cache", 500)],
)
def test_a_fault_of_the_server_is_no_mistake_of_the_client(
    path: str, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    client = TestClient(faulty_app(), raise_server_exceptions=False)
    with caplog.at_level(logging.WARNING, logger=stock_faults.__name__):
        answer = client.post(path)
    assert answer.status_code == status, answer.text
    (record,) = [one for one in caplog.records if one.name == stock_faults.__name__]
    assert (record.levelname == "ERROR") == (status != 400)
    assert (record.exc_info is not None) == (status != 400)


def test_what_nobody_has_told_is_raised() -> None:
    async def broken(scope: Any, receive: Any, send: Any) -> None:
        raise KeyError("not answered")

    with pytest.raises(KeyError, match="not answered"):
        TestClient(guard(broken)).get("/health")


@pytest.mark.parametrize(
    ("path", "flag"),
    [
        ("/start_expert_distribution_record", "--expert-distribution-recorder-mode"),
        ("/stop_expert_distribution_record", "--expert-distribution-recorder-mode"),
        ("/dump_expert_distribution_record", "--expert-distribution-recorder-mode"),
        ("/release_memory_occupation", "--enable-memory-saver"),
        ("/resume_memory_occupation", "--enable-memory-saver"),
    ],
)
def test_a_route_that_needs_a_flag_says_so(rag_server: Any, path: str, flag: str) -> None:
    answer = send(rag_server, path, b"{}")
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == f"{path} needs {flag} at the start"
    with rag_server.client("acme") as client:
        assert client.post(path, json={}).status_code == 403
    assert is_well(rag_server)


def test_a_profile_is_taken_on_the_cpu_too(rag_server: Any, tmp_path: Path) -> None:
    rag_server.wait_idle()
    begun = send(rag_server, "/start_profile", json.dumps({"output_dir": str(tmp_path)}).encode())
    assert begun.status_code == 200, begun.text
    body = {"text": "One two", "sampling_params": {"max_new_tokens": 2}}
    assert rag_server.post("/generate", body).status_code == 200
    ended = send(rag_server, "/stop_profile", b"")
    assert ended.status_code == 200, ended.text
    assert list(tmp_path.rglob("*.json*"))
    assert is_well(rag_server)


@pytest.fixture
def exchange(rag_server: Any) -> Callable[[bytes], bytes]:
    """Send bytes over a socket and read until the server closes it."""

    def run(sent: bytes) -> bytes:
        parts = urlsplit(rag_server.url)
        answer = b""
        with socket.create_connection((parts.hostname, parts.port), timeout=10) as connection:
            connection.sendall(sent)
            while piece := connection.recv(4096):
                answer += piece
        return answer

    return run


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/rag/search HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/rag/search HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
        b"POST /generate HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\nZZ\r\n",
    ],
)
def test_bytes_that_are_no_http(rag_server: Any, exchange: Any, sent: bytes) -> None:
    before = rag_server.log.read_text(errors="replace").count("Traceback")
    answer = exchange(sent)
    # One answer: the guard's, if it had answered before the fault came, or that this is no HTTP.
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.split()[1] in (b"400", b"401"), answer
    assert answer.count(b"HTTP/1.1 4") == 1
    assert json.loads(body)["error"]["message"]
    assert rag_server.log.read_text(errors="replace").count("Traceback") == before


def test_a_conversation_past_the_window_is_cut_and_other_requests_are_refused_as_ever(
    rag_server: Any,
) -> None:
    said = "The lighthouse was painted green by its keeper, who liked the colour very much. "
    messages: list[dict[str, str]] = []
    for turn in range(9):
        messages += [{"role": "user", "content": f"{turn}: {18 * said}"}]
        messages += [{"role": "assistant", "content": "Indeed."}]
    messages = [*messages, {"role": "user", "content": "Which colour?"}]
    body = {"model": "m", "messages": messages, "max_tokens": 4, "temperature": 0}
    body |= {"return_meta_info": True}
    custom = {"rag_conversation": "long", "rag_policy": "reuse"}

    def ask(more: dict[str, Any]) -> Any:
        return send(rag_server, "/v1/chat/completions", json.dumps(body | more).encode())

    told = ask({"custom_params": custom})
    assert told.status_code == 200, told.text
    report = told.json()["choices"][0]["meta_info"]["rag_fusion"]
    assert 0 < report["truncated"]["turns"] < 9
    assert report["prompt_tokens"] < 2048
    for plain in ({}, {"custom_params": {"rag_policy": "reuse"}}):
        refused = ask(plain)
        assert refused.status_code == 400
        assert "longer than the model's context length" in refused.text
