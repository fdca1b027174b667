"""SGLang's own routes on a server of ours: what they were not written for is refused in one line, and hurts nobody."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

pytestmark = pytest.mark.engine

CHAT = "/v1/chat/completions"
ASKED = [{"role": "user", "content": "x"}]
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
    before = rag_server.log.read_text(errors="replace").count("Traceback")
    answer = send(rag_server, path, content)
    assert answer.status_code == 400, answer.text
    assert "Internal Server Error" not in answer.text
    assert "\n" not in answer.text
    assert rag_server.log.read_text(errors="replace").count("Traceback") == before


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
        ("/v1/responses", {"model": "m", "input": []}),
        ("/api/generate", {"model": "m", "prompt": "", "stream": False}),
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
        ("/v1/completions", {"model": "m", "prompt": "x", "logprobs": 10**6}),
        (CHAT, {"model": "m", "messages": ASKED, "logprobs": True, "top_logprobs": 10**6}),
        ("/v1/score", {"model": "m", "query": "", "items": [""], "label_token_ids": [1]}),
    ],
)
def test_what_the_scheduler_would_die_of_is_refused(rag_server: Any, path: str, body: Any) -> None:
    """Behind it nobody was answered any more; a tenant's key was enough for most."""
    answer = rag_server.post(path, body)
    # A stream has begun when its prompt is read: its one event holds the error.
    refused = answer.status_code == 400 or '"error"' in answer.text or "is empty" in answer.text
    assert refused or (answer.status_code == 200 and path == "/api/generate"), answer.text
    ordinary = {"text": "One", "sampling_params": {"max_new_tokens": 1}}
    assert rag_server.post("/generate", ordinary).status_code == 200


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
