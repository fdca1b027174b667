"""Uploads without an engine: told, replaced and deleted by name, and the same over HTTP."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import quote

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient
from uploads import Text, Uploads, records

from rag_pipeline.server.errors import ApiError
from rag_pipeline.server.file_names import file_of
from rag_pipeline.server.routes import make_router
from rag_pipeline.server.tenants import Tenant
from retrievers import Embedder, ingest


def test_a_file_is_replaced_and_deleted_with_every_record_it_brought(
    make_uploads: Callable[..., Uploads],
) -> None:
    uploads = make_uploads()
    uploads.upload({"birds.jsonl": records(("1", "Herons fish."), ("2", "Owls hunt."))})
    uploads.upload({"birds.json": json.dumps([{"id": "1", "text": "Rooks nest."}])})
    assert uploads.ids() == {
        "uploads/birds.jsonl#1",
        "uploads/birds.jsonl#2",
        "uploads/birds.json#1",
    }
    # The same name again: what is no longer in it goes, what is new comes.
    job = uploads.upload({"birds.jsonl": records(("2", "Owls sleep."), ("3", "Kites soar."))})
    assert (job.state, job.documents) == ("done", 2)
    assert uploads.ids() == {
        "uploads/birds.jsonl#2",
        "uploads/birds.jsonl#3",
        "uploads/birds.json#1",
    }
    # A file that cannot be read replaces nothing.
    job = uploads.upload({"birds.jsonl": "not JSON", "ok.txt": "Fine."})
    assert [item["name"] for item in job.skipped] == ["birds.jsonl"]
    assert "uploads/birds.jsonl#3" in uploads.ids()
    assert uploads.delete("uploads/birds.jsonl#3") == 1
    assert uploads.delete("uploads/birds.jsonl") == 1
    assert uploads.ids() == {"uploads/birds.json#1", "uploads/ok.txt"}
    with pytest.raises(ApiError) as gone:
        uploads.delete("uploads/birds.jsonl")
    assert gone.value.status == 404


def test_what_of_a_file_was_left_out_is_told_and_outlives_the_server(
    make_uploads: Callable[..., Uploads],
) -> None:
    uploads = make_uploads()
    lines = [
        records(("1", "Herons fish.")),
        "{broken\n",
        '{"id": "\\ud800", "text": "Owls \\udfff hunt."}\n',
    ]
    texts: dict[str, Text] = {
        "birds.jsonl": "".join(lines),
        "fish.json": json.dumps([{"text": "Pike."}, {"weight": 3}]),
        "many.jsonl": records(("1", "Kites soar.")) + "{broken\n" * 30,
        "latin.txt": "Die Bürger hörten später die schöne Überraschung und größere Äußerungen.".encode("latin-1"),
    }  # fmt: skip
    job = uploads.upload(texts)
    assert (job.state, job.skipped, job.documents) == ("done", [], 5)
    told: dict[str, list[str]] = {}
    for item in job.notes:
        told.setdefault(item["name"], []).append(item["note"])
    (broken,) = told["birds.jsonl"]
    assert broken.startswith("line 2: not JSON: ")
    assert told["fish.json"][0].startswith("record 1: no passages in this record")
    assert told["latin.txt"][0].startswith("read as cp1252, a guess")
    assert len(told["many.jsonl"]) == 21
    assert told["many.jsonl"][-1] == "and 10 more"
    for item in job.notes:
        assert str(uploads.folder) not in item["note"]
        assert "\n" not in item["note"]
    uploads.jobs.close()
    uploads.start()
    assert uploads.jobs.get("acme", job.id).notes == job.notes


def test_names_that_begin_alike_do_not_touch_each_other(
    make_uploads: Callable[..., Uploads],
) -> None:
    uploads = make_uploads()
    names = ["a", "a#1", "a.md", "a.md.parsed", "a.md#x", "a.jsonl.txt", "a.txt", "A.md", "documents.jsonl.md",
             "job.json.txt", "0000", "résumé.md"]  # fmt: skip
    texts: dict[str, Text] = {name: f"Text of {name}." for name in names}
    job = uploads.upload({**texts, "a.jsonl": records(("1", "One."), ("txt", "Two."))})
    assert (job.state, job.skipped) == ("done", [])
    ids = {f"uploads/{name}" for name in names} | {"uploads/a.jsonl#1", "uploads/a.jsonl#txt"}
    assert uploads.ids() == ids
    for name in ("a.jsonl", "a", "a.md", "re\u0301sume\u0301.md"):
        uploads.delete(f"uploads/{name}")
        ids -= {i for i in ids if file_of(i) == name.replace("e\u0301", "é")}
        assert uploads.ids() == ids
    assert len(ids) == len(names) - 3


def test_a_document_is_deleted_behind_its_upload(make_uploads: Callable[..., Uploads]) -> None:
    uploads = make_uploads()
    uploads.submit({"later.txt": "Some text."})
    assert uploads.delete("uploads/later.txt") == 1
    assert uploads.ids() == set()


def test_what_parses_and_embeds_an_upload_gives_way_to_questions(
    make_uploads: Callable[..., Uploads], monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = os.getpriority(os.PRIO_PROCESS, 0)
    behind = min(19, mine + 10)
    found: list[tuple[str, int]] = []

    def note(what: str, number: int) -> None:
        found.append((what, os.getpriority(os.PRIO_PROCESS, number)))

    start, encode = subprocess.Popen.__init__, Embedder.encode_documents

    def started(process: Any, *args: Any, **options: Any) -> None:
        start(process, *args, **options)
        while process.poll() is None and ("parse", behind) not in found:
            note("parse", process.pid)
            time.sleep(0.01)

    def embedded(*args: Any, **options: Any) -> Any:
        note("embed", threading.get_native_id())
        return encode(*args, **options)

    def indexed(*args: Any, **options: Any) -> Any:
        note("write", threading.get_native_id())
        return ingest(*args, **options)

    uploads = make_uploads()
    with monkeypatch.context() as watched:
        watched.setattr(subprocess.Popen, "__init__", started)
        watched.setattr(Embedder, "encode_documents", embedded)
        watched.setattr("rag_pipeline.server.ingest_run.ingest", indexed)
        assert uploads.upload({"a.txt": "One line."}).state == "done"
    # It holds the interpreter, and others would wait with it.
    assert ("write", mine) in found
    assert {one for one in found if one[0] == "embed"} == {("embed", behind)}
    assert ("parse", behind) in found
    assert os.getpriority(os.PRIO_PROCESS, 0) == mine


def test_deletions_that_wait_are_counted_even_when_their_clients_went(
    make_uploads: Callable[..., Uploads],
) -> None:
    uploads = make_uploads(max_queued_jobs=3)
    gate = threading.Event()
    uploads.jobs._queues.put("acme", gate.wait)
    uploads.submit({"a.txt": "Text."})
    waiting = [uploads.jobs.delete("acme", uploads.index(), "uploads/a.txt") for _ in range(2)]
    assert waiting[0].cancel()  # its client went; its place in the queue is taken still
    for more in (
        lambda: uploads.jobs.delete("acme", uploads.index(), "uploads/a.txt"),
        lambda: uploads.jobs.check_room("acme"),
    ):
        with pytest.raises(ApiError) as refusal:
            more()
        assert refusal.value.status == 429
    uploads.jobs.check_room("globex")
    gate.set()
    assert waiting[1].result(60) == 1
    assert uploads.upload({"b.txt": "Text."}).state == "done"


# -- over HTTP, without an engine -----------------------------------------------------------------


@pytest.fixture
def client(make_uploads: Callable[..., Uploads]) -> Iterator[TestClient]:
    uploads = make_uploads(max_upload_bytes=8 << 20)
    tenant = Tenant(name="acme", salt="", indexes={"main": uploads.index().folder})

    class Service:
        """What the routes of documents use of the service."""

        settings, jobs = uploads.settings, uploads.jobs

        class indexes:
            get = staticmethod(lambda tenant, name: uploads.index())

        tenant = staticmethod(lambda request: tenant)

        @staticmethod
        async def in_thread(tenant: Tenant, function: Callable[..., Any], *args: Any) -> Any:
            return await asyncio.to_thread(function, *args)

    app = FastAPI()
    app.include_router(make_router(Service()))  # type: ignore[arg-type]
    with TestClient(app, base_url="http://127.0.0.1") as client:
        yield client


DOCUMENTS = "/v1/rag/documents"


def ended(client: TestClient, job: dict[str, Any]) -> dict[str, Any]:
    state = job
    while state["state"] not in ("done", "failed"):
        time.sleep(0.05)
        state = client.get(f"/v1/rag/jobs/{job['id']}").json()
    return state


def test_one_bad_name_costs_its_own_file_only(client: TestClient) -> None:
    files = [
        ("file", ("हिन्दी रिपोर्ट.txt", b"In Hindi.")),
        ("file", ("a\u202etxt.exe", b"Turned around.")),
        ("file", ("50% off [new].md", b"# Offer\n\nCheap.")),
    ]
    answer = client.post(DOCUMENTS, files=files)
    assert answer.status_code == 202, answer.text
    job = ended(client, answer.json())
    assert (job["state"], job["documents"]) == ("done", 2)
    (skipped,) = job["skipped"]
    assert skipped["name"] == "'a\\u202etxt.exe'"
    listed = {item["id"] for item in client.get(DOCUMENTS).json()["data"]}
    assert listed == {"uploads/हिन्दी रिपोर्ट.txt", "uploads/50% off [new].md"}
    gone = client.delete(f"{DOCUMENTS}/{quote('uploads/50% off [new].md')}")
    assert (gone.status_code, gone.json()["deleted"]) == (200, True)
    # Where nothing is left of a batch, it is refused at once; so are two files of one name.
    for refused in (
        [("file", ("../x.txt", b"x")), ("file", ("CON", b"x"))],
        [("file", ("re\u0301.txt", b"x")), ("file", ("ré.txt", b"y"))],
    ):
        answer = client.post(DOCUMENTS, files=refused)
        assert answer.status_code == 400, answer.text


def test_texts_are_deleted_behind_their_upload_and_bounded(client: TestClient) -> None:
    body = {"documents": [{"name": "note", "text": "A note."}]}
    job = client.post(DOCUMENTS, json=body).json()
    gone = client.delete(f"{DOCUMENTS}/uploads/note.txt")
    assert (gone.status_code, gone.json()["chunks"]) == (200, 1)
    again = client.delete(f"{DOCUMENTS}/uploads/note.txt")
    assert again.status_code == 404
    assert client.delete(f"/v1/rag/jobs/{job['id']}").json()["state"] == "done"
    assert client.delete("/v1/rag/jobs/job-unknown").status_code == 404
    large = client.post(DOCUMENTS, json={"documents": [{"name": "n", "text": "x" * (5 << 20)}]})
    assert large.status_code == 413
    assert "multipart" in large.json()["error"]["message"]
