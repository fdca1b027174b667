"""The routes of a real server: answers, documents, tenants, and every malformed request."""

from __future__ import annotations

import http.client
import json
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest

pytestmark = pytest.mark.engine

QUESTION = "What does the with statement do?"


def chat(question: str = QUESTION, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}], "max_tokens": 8, **more}


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


def post(server: Any, path: str, body: Any, tenant: str | None = "operator") -> httpx.Response:
    with server.client(tenant) as client:
        return client.post(path, json=body)


def is_one_line(answer: httpx.Response) -> bool:
    error = answer.json()["error"]
    message = error["message"]
    return bool(message) and "\n" not in message and error["code"] == answer.status_code


# -- chat ---------------------------------------------------------------------------------------


def test_answer_with_citations_and_an_account_of_the_prompt(rag_server: Any) -> None:
    body = chat(rag={"k": 3, "search": "bm25", "policy": "prefix"})
    first = post(rag_server, "/v1/rag/chat/completions", body).json()
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
    again = post(rag_server, "/v1/rag/chat/completions", body).json()
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
        assert post(rag_server, ask, body).status_code == 200
    rag_server.wait_idle()
    deadline = time.monotonic() + 240
    mixed = chat("lambda while", rag={"k": 6, "search": "bm25", "policy": "query:0.2"})
    while True:
        answer = post(rag_server, ask, mixed).json()
        assert adds_up(answer)
        if answer["rag"]["fused"]:
            break
        assert time.monotonic() < deadline, answer["rag"]
        time.sleep(1)
        rag_server.wait_idle()
    assert details(answer)["reused_tokens"] > 0
    assert answer["rag"]["policy"] == "query"
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
    whole = post(rag_server, "/v1/rag/chat/completions", chat(rag={"policy": "prefix"})).json()
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
        assert client.get("/v1/rag/health").json()["status"] == "ok"


# -- malformed ----------------------------------------------------------------------------------

ASK, FIND = "/v1/rag/chat/completions", "/v1/rag/search"
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
    (ASK, chat(rag={"search": "psychic"}), "rag.search is 'psychic'"),
    (ASK, chat(rag={"where": {"$near": 1}}), "$near"),
    (ASK, chat(rag={"index": "../../etc"}), "rag.index is '../../etc'"),
    (ASK, chat(temperature=-1), "temperature is -1"),
    (ASK, chat(max_tokens=0), "max_tokens is 0"),
    (ASK, chat(max_tokens=100_000), "does not fit"),
    (ASK, chat("word " * 6000), "does not fit"),
    (ASK, chat(tools=[]), "tools is not known here"),
    (ASK, chat(n=3), "n is 3"),
    (ASK, chat(stream_options={"include_usage": True}), "set stream to true"),
    (ASK, [1, 2], "one JSON object"),
    (ASK, "text", "one JSON object"),
    (FIND, {}, "query is missing"),
    (FIND, {"query": ""}, "query is ''"),
    (FIND, {"query": "x", "k": 10**30}, "k is"),
    (FIND, {"query": "x", "where": []}, "where is []"),
]


@pytest.mark.parametrize(("path", "body", "line"), MALFORMED)
def test_malformed_requests_get_400_and_one_line(
    rag_server: Any, path: str, body: Any, line: str
) -> None:
    answer = post(rag_server, path, body)
    assert answer.status_code == 400, answer.text
    assert is_one_line(answer)
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
    assert is_one_line(answer)


def test_a_body_without_a_length_is_bounded_too(rag_server: Any) -> None:
    def pieces() -> Any:
        for _ in range(40):
            yield b"x" * (1 << 16)

    with rag_server.client() as client:
        answer = client.post(ASK, content=pieces(), headers={"Content-Type": "application/json"})
    assert answer.status_code == 413
    assert is_one_line(answer)


def test_unknown_index_and_empty_index(rag_server: Any) -> None:
    unknown = post(rag_server, ASK, chat(rag={"index": "nowhere"}))
    assert unknown.status_code == 404
    assert "this key has topics, extra" in unknown.json()["error"]["message"]
    empty = post(rag_server, ASK, chat(rag={"index": "extra"}))
    assert empty.status_code == 409
    assert "upload documents" in empty.json()["error"]["message"]
    assert is_one_line(empty)


# -- search, health -----------------------------------------------------------------------------


@pytest.mark.parametrize("search", ["dense", "bm25", "hybrid"])
def test_search(rag_server: Any, search: str) -> None:
    body = {"query": "lambda expressions", "k": 3, "search": search}
    found = post(rag_server, FIND, body).json()
    assert found["index"] == "topics"
    assert found["data"][0]["document_id"] == "lambda"
    scores = [item["score"] for item in found["data"]]
    assert scores == sorted(scores, reverse=True)


def test_health_tells_activation_gate_index_and_cache(rag_server: Any) -> None:
    with rag_server.client() as client:
        answer = client.get("/v1/rag/health")
    assert answer.status_code == 200
    health = answer.json()
    assert health["status"] == "ok", health["problems"]
    assert health["activation"]["active"]
    assert health["activation"]["unapplied"] == []
    assert health["gate"]["on"]
    assert health["gate"]["self_check"].startswith("passed")
    assert health["gate"]["model"]["status"] == "none"
    assert health["index"]["topics"]["documents"] == 4
    assert health["index"]["extra"] is not None
    assert health["cache"]["store"]["byte_budget"] > 0
    assert rag_server.keys["operator"] not in answer.text


# -- keys and tenants ---------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/rag/health", "/v1/rag/documents", "/v1/rag/jobs/x"])
def test_no_key_no_answer(rag_server: Any, path: str) -> None:
    for tenant in (None, "wrong"):
        headers = {} if tenant is None else {"Authorization": "Bearer nobody-has-this-key"}
        answer = httpx.get(f"{rag_server.url}{path}", headers=headers, trust_env=False)
        assert answer.status_code == 401
    # A host that looks like an open path does not open a closed one.
    place = urlsplit(rag_server.url)
    raw = http.client.HTTPConnection(place.hostname or "", place.port, timeout=30)
    raw.putrequest("GET", path, skip_host=True)
    raw.putheader("Host", "x/health?")
    raw.endheaders()
    assert raw.getresponse().status in (400, 401)
    raw.close()


def test_tenants_see_their_own_documents_only(rag_server: Any, server_secrets: Any) -> None:
    mine, other = server_secrets
    everything = {
        "query": "walrus vault lighthouse turbine water reservoir",
        "k": 64,
        "search": "bm25",
    }
    seen = {
        tenant: post(rag_server, FIND, everything, tenant)
        for tenant in ("operator", "acme", "globex")
    }
    assert mine in seen["acme"].text
    assert other in seen["globex"].text
    for tenant, secret in (
        ("acme", other),
        ("globex", mine),
        ("operator", mine),
        ("operator", other),
    ):
        assert secret not in seen[tenant].text
    for index in ("topics", "plant", "acme "):
        answer = post(rag_server, FIND, {"query": "x", "index": index}, "acme")
        assert answer.status_code in (400, 404)
        assert is_one_line(answer)
    for path in ("/server_info", "/flush_cache", "/openapi.json"):
        assert post(rag_server, path, {}, "acme").status_code in (401, 403)


def test_tenants_share_no_kv_whatever_salt_they_send(rag_server: Any) -> None:
    """The same prompt of another tenant is not found in the radix tree, on the stock route either."""
    words = " ".join(f"unusual{n}" for n in range(60))
    salts: list[str | None] = [None, "x", "tenant-guess"]

    def cached(tenant: str, salt: str | None) -> int:
        body: dict[str, Any] = {"text": words, "sampling_params": {"max_new_tokens": 1}}
        if salt is not None:
            body["cache_salt"] = salt
        answer = post(rag_server, "/generate", body, tenant)
        assert answer.status_code == 200, answer.text
        return int(answer.json()["meta_info"]["cached_tokens"])

    for salt in salts:
        assert cached("acme", salt) == 0
        assert cached("acme", salt) > 50
    for salt in salts:
        assert cached("globex", salt) == 0
    assert cached("operator", None) == 0
    from rag_pipeline.server import Tenants

    tenants = Tenants.load(
        {"topics": rag_server.folder / "topics"}, rag_server.folder / "tenants.json"
    )
    assert cached("operator", "another") == 0
    assert cached("globex", tenants.salt_of(rag_server.keys["acme"])) == 0


@pytest.fixture
def server_secrets() -> tuple[str, str]:
    return (
        "The purple walrus guards vault seventeen under the old lighthouse of Brenmark.",
        "Turbine nine is cooled with distilled rain water from the northern reservoir.",
    )


# -- documents ----------------------------------------------------------------------------------


def wait_for(client: httpx.Client, job: str) -> dict[str, Any]:
    deadline = time.monotonic() + 240
    seen = 0.0
    while True:
        state: dict[str, Any] = client.get(f"/v1/rag/jobs/{job}").json()
        assert state["progress"] >= seen
        seen = state["progress"]
        if state["state"] in ("done", "failed"):
            return state
        assert time.monotonic() < deadline, state
        time.sleep(0.1)


def test_upload_ask_delete(rag_server: Any, tmp_path: Path) -> None:
    files = [
        (
            "file",
            ("Heron guide.md", b"# Herons\n\nThe grey heron of Lake Umbra eats silver eels.\n"),
        ),
        ("file", ("broken.pdf", b"%PDF-1.4 nothing in here")),
    ]
    with rag_server.client("globex") as client:
        answer = client.post("/v1/rag/documents", files=files, data={"index": "fresh"})
        assert answer.status_code == 202, answer.text
        job = wait_for(client, answer.json()["id"])
        assert job["state"] == "done", job
        assert job["documents"] == 1
        assert [item["name"] for item in job["skipped"]] == ["broken.pdf"]
        listed = client.get("/v1/rag/documents", params={"index": "fresh"}).json()
        assert [item["id"] for item in listed["data"]] == ["uploads/Heron guide.md"]
        assert listed["jobs"][0]["id"] == job["id"]
        body = chat("What does the heron eat?", rag={"index": "fresh", "k": 1})
        answer = client.post(ASK, json=body)
        assert "silver eels" in answer.json()["rag"]["citations"][0]["text"]
        # The same name again replaces the document.
        again = client.post(
            "/v1/rag/documents",
            json={
                "index": "fresh",
                "documents": [
                    {"name": "Heron guide.md", "text": "# Herons\n\nNow it eats golden carp only."}
                ],
            },
        )
        assert wait_for(client, again.json()["id"])["state"] == "done"
        found = client.post(FIND, json={"query": "heron", "index": "fresh", "k": 9}).json()["data"]
        assert len(found) == 1
        assert "golden carp" in found[0]["text"]
        # Another tenant sees neither the job nor the document.
        with rag_server.client("acme") as other:
            assert other.get(f"/v1/rag/jobs/{job['id']}").status_code == 404
            gone = other.delete("/v1/rag/documents/uploads/Heron guide.md")
            assert gone.status_code == 404
        gone = client.delete("/v1/rag/documents/uploads/Heron guide.md", params={"index": "fresh"})
        assert gone.json() == {
            "id": "uploads/Heron guide.md",
            "object": "rag.document.deleted",
            "deleted": True,
            "chunks": 1,
        }
        assert client.post(FIND, json={"query": "heron", "index": "fresh"}).status_code == 409
        missing = client.delete("/v1/rag/documents/uploads/nothing", params={"index": "fresh"})
        assert missing.status_code == 404
        assert is_one_line(missing)


@pytest.mark.parametrize(
    "name", ["../../evil.txt", "..\\evil.txt", "/etc/cron.d/evil", ".ssh", "evil\0.txt", "x" * 400]
)
def test_no_name_leaves_its_folder(rag_server: Any, name: str) -> None:
    body = {"index": "extra", "documents": [{"name": name, "text": "evil"}]}
    for answer in (
        post(rag_server, "/v1/rag/documents", body),
        _raw_upload(rag_server, name),
    ):
        assert answer.status_code == 400, answer.text
        assert is_one_line(answer)
    assert not list(rag_server.folder.rglob("*evil*"))
    assert not list(rag_server.folder.rglob(".ssh"))


def _raw_upload(server: Any, name: str) -> httpx.Response:
    """Multipart as an attacker writes it: no client library cleans the name."""
    head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="' + name.encode()
    content = head + b'"\r\nContent-Type: text/plain\r\n\r\nevil\r\n--b--\r\n'
    with server.client() as client:
        return client.post(
            "/v1/rag/documents",
            content=content,
            headers={"Content-Type": "multipart/form-data; boundary=b"},
        )


def test_malformed_uploads(rag_server: Any) -> None:
    path = "/v1/rag/documents"
    with rag_server.client() as client:
        answers = [
            client.post(path),
            client.post(path, content=b"x", headers={"Content-Type": "text/plain"}),
            client.post(path, json={"documents": []}),
            client.post(path, json={"documents": [{"name": "a.txt"}]}),
            client.post(path, json={"documents": [{"name": "a", "text": "x"}], "more": 1}),
            client.post(path, files={"other": ("a.txt", b"x")}),
            client.post(path, data={"index": "topics"}),
            client.post(
                path, content=b"junk", headers={"Content-Type": "multipart/form-data; boundary=b"}
            ),
            client.post(path, content=b"junk", headers={"Content-Type": "multipart/form-data"}),
            client.post(path, files=[("file", ("a.txt", b"x")), ("file", ("a.txt", b"y"))]),
            client.get(path, params={"limit": "many"}),
            client.get(path, params={"index": "../x"}),
        ]
        for answer in answers:
            assert answer.status_code == 400, answer.text
            assert is_one_line(answer), answer.text
        large = client.post(path, files={"file": ("a.txt", b"x" * (2 << 20))})
        assert large.status_code == 413
        assert is_one_line(large)
        # A file that no parser can read is the job's fault to report, not the server's.
        job = client.post(path, files={"file": ("a.pdf", b"junk")}, data={"index": "extra"})
        state = wait_for(client, job.json()["id"])
        assert state["state"] == "failed"
        assert "\n" not in state["error"]


def test_the_page_needs_no_key_and_lets_nothing_in(rag_server: Any) -> None:
    for path in ("/rag", "/rag/rag.js", "/rag/strip.js", "/rag/rag.css"):
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
