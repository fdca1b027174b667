"""Documents over HTTP: uploaded, asked about, replaced, deleted; no name leaves its folder."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import httpx
import pytest

pytestmark = pytest.mark.engine

ASK, FIND = "/v1/rag/chat/completions", "/v1/rag/search"


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
        body = {
            "messages": [{"role": "user", "content": "What does the heron eat?"}],
            "max_tokens": 8,
            "rag": {"index": "fresh", "k": 1},
        }
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
        assert rag_server.is_one_line(missing)


@pytest.mark.parametrize(
    "name", ["../../evil.txt", "..\\evil.txt", "/etc/cron.d/evil", ".ssh", "evil\0.txt", "x" * 400]
)
def test_no_name_leaves_its_folder(rag_server: Any, name: str) -> None:
    body = {"index": "extra", "documents": [{"name": name, "text": "evil"}]}
    for answer in (
        rag_server.post("/v1/rag/documents", body),
        _raw_upload(rag_server, name),
    ):
        assert answer.status_code == 400, answer.text
        assert rag_server.is_one_line(answer)
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
            assert rag_server.is_one_line(answer), answer.text
        large = client.post(path, files={"file": ("a.txt", b"x" * (2 << 20))})
        assert large.status_code == 413
        assert rag_server.is_one_line(large)
        # A file that no parser can read is the job's fault to report, not the server's.
        job = client.post(path, files={"file": ("a.pdf", b"junk")}, data={"index": "extra"})
        state = wait_for(client, job.json()["id"])
        assert state["state"] == "failed"
        assert "\n" not in state["error"]
