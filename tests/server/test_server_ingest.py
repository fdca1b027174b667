"""Uploads without an engine: replaced and deleted by name, durable, one queue per tenant, bounded."""

from __future__ import annotations

import asyncio
import errno
import gzip
import json
import os
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from rag_pipeline.server import ServerSettings, parsing
from rag_pipeline.server.embedders import EmbedderPool
from rag_pipeline.server.errors import ApiError
from rag_pipeline.server.file_names import file_of
from rag_pipeline.server.indexes import ServedIndex
from rag_pipeline.server.ingest_jobs import IngestJobs, Job
from rag_pipeline.server.parsing import ParseError
from rag_pipeline.server.routes import make_router
from rag_pipeline.server.tenants import Tenant
from rag_pipeline.server.turns import Turns
from retrievers import RetrievalError

Text = str | bytes
FIRST_IMPORTS = (
    "ctypes.py",
    "errno.py",
    "gzip.py",
    "json.py",
    "rag_pipeline.py",
    "resource.py",
    "retrievers.py",
    "zlib.py",
)


class Uploads:
    """A spool, some indexes, and servers that come and go."""

    def __init__(self, folder: Path, settings: ServerSettings, embedders: EmbedderPool) -> None:
        self.folder = folder
        self.settings = settings
        self.indexes = {
            (tenant, "main"): ServedIndex("main", folder / tenant, embedders)
            for tenant in ("acme", "globex")
        }
        self.jobs = self.start()

    def start(self) -> IngestJobs:
        self.jobs = IngestJobs(self.settings, spool=self.folder / "spool")
        self.jobs.resume(self.indexes)
        return self.jobs

    def index(self, tenant: str = "acme") -> ServedIndex:
        return self.indexes[tenant, "main"]

    def submit(self, files: dict[str, Text], tenant: str = "acme") -> Job:
        folder = self.jobs.new_folder()
        for name, content in files.items():
            data = content.encode() if isinstance(content, str) else content
            self.jobs.add_file(folder, name, [data])
        return self.jobs.submit(tenant, self.index(tenant), folder)

    def upload(self, files: dict[str, Text], tenant: str = "acme") -> Job:
        job = self.submit(files, tenant)
        self.wait(lambda: job.ended)
        return job

    def delete(self, document_id: str, tenant: str = "acme") -> int:
        return self.jobs.delete(tenant, self.index(tenant), document_id).result(60)

    def ids(self, tenant: str = "acme") -> set[str]:
        current = self.index(tenant).current()
        return set() if current is None else {record.id for record in current.documents()}

    def left(self) -> list[Path]:
        """Files of uploads in the spool, records and locks aside."""
        spool = self.folder / "spool"
        names = ("job.json", ".lock")
        return [path for path in spool.rglob("*") if path.is_file() and path.name not in names]

    @staticmethod
    def wait(ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while not ready():
            assert time.monotonic() < deadline
            time.sleep(0.02)


@pytest.fixture(scope="module")
def embedders(minilm_path: Path) -> EmbedderPool:
    return EmbedderPool(str(minilm_path))


@pytest.fixture
def make_uploads(
    tmp_path: Path, smollm2_path: Path, embedders: EmbedderPool
) -> Iterator[Callable[..., Uploads]]:
    made: list[Uploads] = []

    def make(**limits: Any) -> Uploads:
        settings = ServerSettings(model=smollm2_path, embedder=embedders.default, **limits)
        made.append(Uploads(tmp_path, settings, embedders))
        return made[-1]

    yield make
    for uploads in made:
        uploads.jobs.close()


def records(*pairs: tuple[str, str]) -> str:
    return "".join(json.dumps({"id": key, "text": text}) + "\n" for key, text in pairs)


# -- by name ------------------------------------------------------------------------------------


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
    assert told["birds.jsonl"] == ["line 2: not JSON: " + told["birds.jsonl"][0][18:]]
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


def test_deletions_that_wait_are_counted_even_when_their_clients_went(
    make_uploads: Callable[..., Uploads],
) -> None:
    uploads = make_uploads(max_queued_jobs=3)
    gate = threading.Event()
    uploads.jobs._put("acme", gate.wait)
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


# -- durable ------------------------------------------------------------------------------------


def test_what_was_accepted_is_finished_by_the_next_server(
    make_uploads: Callable[..., Uploads],
) -> None:
    uploads = make_uploads()
    uploads.jobs._put("acme", uploads.jobs._stop.wait)  # holds the queue until the server stops
    first = uploads.submit({"a.txt": "The first version."})
    second = uploads.submit({"a.txt": "The second version.", "b.md": "# B\n\nMore."})
    folder = uploads.jobs._folders[first.id]
    modes = {stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*")}
    assert modes == {0o600, 0o700}
    half = uploads.jobs.new_folder()  # an upload that broke off was never accepted
    uploads.jobs.add_file(half, "c.txt", [b"half"])
    uploads.jobs.close()
    assert not first.ended
    jobs = uploads.start()
    uploads.wait(lambda: jobs.get("acme", second.id).ended)
    for job in (first, second):
        assert jobs.get("acme", job.id).state == "done"
        assert jobs.get("acme", job.id).tries == 1
    assert uploads.ids() == {"uploads/a.txt", "uploads/b.md"}
    hit = uploads.index().search("version", k=1, mode="bm25")[0]
    assert hit.chunk.text == "The second version."
    assert uploads.left() == []
    # Results are kept over a restart, and nobody else's business.
    jobs.close()
    jobs = uploads.start()
    assert jobs.get("acme", first.id).state == "done"
    with pytest.raises(ApiError):
        jobs.get("globex", first.id)


def test_only_an_upload_that_nobody_serves_grows_too_old(
    make_uploads: Callable[..., Uploads],
) -> None:
    uploads = make_uploads()
    for tenant in ("acme", "globex"):
        uploads.jobs._put(tenant, uploads.jobs._stop.wait)
    served, orphan = (uploads.submit({"a.txt": "Text."}, of) for of in ("acme", "globex"))
    for job in (served, orphan):
        job.created -= 8 * 24 * 3600
        uploads.jobs._spool.write(uploads.jobs._folders[job.id], job.to_record())
    uploads.jobs.close()
    del uploads.indexes["globex", "main"]
    jobs = uploads.start()
    uploads.wait(lambda: jobs.get("acme", served.id).ended)
    assert jobs.get("acme", served.id).state == "done"
    assert uploads.ids() == {"uploads/a.txt"}
    assert uploads.left() == []


@pytest.mark.parametrize(
    "error",
    [
        RetrievalError("/srv/acme/main is a file; name a folder for the index"),
        OSError(errno.ENOSPC, "No space left on device", "/srv/acme/main"),
        ParseError("/srv/acme/work/0001 is damaged"),
    ],
)
def test_no_path_of_the_server_is_told_in_a_job(
    make_uploads: Callable[..., Uploads], error: Exception
) -> None:
    def fail(*given: Any) -> None:
        raise error

    uploads = make_uploads()
    uploads.jobs._run = fail  # type: ignore[assignment]
    job = uploads.upload({"a.txt": "Text."})
    job.skip("b.txt", str(error))
    assert (job.state, bool(job.error)) == ("failed", True)
    assert "/srv" not in json.dumps(job.to_json())


def test_an_upload_that_kills_the_server_is_given_up(make_uploads: Callable[..., Uploads]) -> None:
    uploads = make_uploads()
    uploads.jobs._put("acme", uploads.jobs._stop.wait)
    job = uploads.submit({"poison.txt": "Text."})
    job.tries = 3  # as three servers that died have left it
    uploads.jobs._spool.write(uploads.jobs._folders[job.id], job.to_record())
    uploads.jobs.close()
    jobs = uploads.start()
    uploads.wait(lambda: jobs.get("acme", job.id).ended)
    found = jobs.get("acme", job.id)
    assert found.state == "failed"
    assert "ended 3 times" in str(found.error)
    assert uploads.ids() == set()
    assert uploads.left() == []


def test_uploads_of_a_living_server_are_left_alone(make_uploads: Callable[..., Uploads]) -> None:
    uploads = make_uploads()
    uploads.jobs._put("acme", uploads.jobs._stop.wait)
    job = uploads.submit({"a.txt": "Text."})
    other = IngestJobs(uploads.settings, spool=uploads.folder / "spool")
    try:
        assert other.resume(uploads.indexes) == 0
        with pytest.raises(ApiError):
            other.get("acme", job.id)
    finally:
        other.close()


@pytest.mark.parametrize("python_path", [None, "", ".", ":/nowhere"])
def test_an_upload_is_never_imported(
    make_uploads: Callable[..., Uploads],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    python_path: str | None,
) -> None:
    """A worker imports from where it stands; files may be called like anything that it imports."""
    if python_path is not None:
        monkeypatch.setenv("PYTHONPATH", python_path)
    mark = tmp_path / "ran"
    code = f"open({str(mark)!r}, 'w').write(__name__)\n"
    modules = {name.split(".")[0] for name in sys.modules} | {
        "sitecustomize",
        "usercustomize",
        "ctypes",
        "pypdf",
    }
    names = [
        f"{name}.py" for name in sorted(modules) if name.isidentifier() and not name.startswith("_")
    ]
    uploads = make_uploads(max_documents=5000, max_chunks=50000)
    job = uploads.upload({**dict.fromkeys(names[:60], code), **dict.fromkeys(FIRST_IMPORTS, code)})
    assert (job.state, job.skipped) == ("done", [])
    assert not mark.exists()


def test_a_file_that_fails_midway_replaces_nothing(
    make_uploads: Callable[..., Uploads], monkeypatch: pytest.MonkeyPatch
) -> None:
    uploads = make_uploads()
    uploads.upload({"a.jsonl": records(("1", "Herons fish."), ("2", "Owls hunt."))})
    before = uploads.ids()
    real = parsing._read

    def cut(out: Path, name: str) -> Iterator[parsing.ParsedDocument]:
        if name == "a.jsonl":
            out.write_bytes(out.read_bytes()[:-5])
        return real(out, name)

    monkeypatch.setattr(parsing, "_read", cut)
    job = uploads.upload(
        {"a.jsonl": records(("1", "Herons sleep."), ("3", "Kites soar.")), "b.txt": "Fine."}
    )
    assert [item["name"] for item in job.skipped] == ["a.jsonl"]
    assert uploads.ids() == before | {"uploads/b.txt"}
    assert job.documents == 1


@pytest.mark.parametrize("blank", ["", " ", "\t\n"])
def test_a_blank_id_is_none(make_uploads: Callable[..., Uploads], blank: str) -> None:
    uploads = make_uploads()
    job = uploads.upload(
        {"a.jsonl": records(("1", "Herons fish."), (blank, "Owls hunt."), ("3", "Kites soar."))}
    )
    assert (job.state, job.documents, job.skipped) == ("done", 3, [])
    assert uploads.delete("uploads/a.jsonl") == 3


# -- bounded ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("line.jsonl.gz", gzip.compress(json.dumps({"text": "a " * (5 << 20)}).encode()), "unpacks to more than 8"),
        ("many.jsonl", records(*((str(n), f"Text {n}.") for n in range(41))), "more than 40 documents"),
        ("long.txt", "word. " * 60_000, "more than 600 chunks"),
        ("title.json", json.dumps({"id": "k" * 2000, "text": "x"}), "id is longer than 1000"),
        ("meta.json", json.dumps({"text": "x", "metadata": {"a": "b" * 20_000}}), "16 KiB of metadata"),
        ("all.jsonl", json.dumps({"text": "word. " * 40_000, "metadata": {"a": "b" * 16_000}}), "metadata and titles of all"),
        ("deep.json", "[" * 100_000, "not JSON"),
        ("empty.txt", "", "no text"),
        ("broken.jsonl.gz", b"not gzip", "gzip"),
    ],
)  # fmt: skip
def test_a_file_beyond_its_limits_is_one_line(
    make_uploads: Callable[..., Uploads], name: str, content: Text, line: str
) -> None:
    uploads = make_uploads(max_upload_bytes=1 << 20, max_documents=40, max_chunks=600)
    job = uploads.upload({name: content, "ok.txt": "Fine."})
    assert (job.state, job.documents) == ("done", 1)
    (skipped,) = job.skipped
    assert skipped["name"] == name
    assert line in skipped["reason"]
    assert "\n" not in skipped["reason"]
    assert str(uploads.folder) not in skipped["reason"]
    assert uploads.ids() == {"uploads/ok.txt"}
    assert uploads.left() == []


def test_a_tenants_slow_upload_holds_nobody_else_and_can_be_cancelled(
    make_uploads: Callable[..., Uploads],
) -> None:
    uploads = make_uploads()
    slow = uploads.submit({"slow.txt": "\"'. " * 400_000})
    waiting = uploads.submit({"next.txt": "Behind it."})
    uploads.wait(lambda: slow.state != "queued")
    assert uploads.upload({"b.txt": "A neighbour."}, "globex").state == "done"
    assert uploads.delete("uploads/b.txt", "globex") == 1
    assert not slow.ended
    assert uploads.jobs.cancel("acme", waiting.id).error == "cancelled"
    uploads.jobs.cancel("acme", slow.id)
    uploads.wait(lambda: slow.ended)
    assert (slow.state, slow.error) == ("failed", "cancelled")
    assert uploads.ids() == set()
    assert uploads.left() == []


def test_the_next_turn_is_the_longest_waiting_ones() -> None:
    turns, order = Turns(), []
    go = [threading.Event() for _ in range(3)]

    def work(number: int) -> None:
        for _ in range(2):
            go[number].set()
            with turns.turn():
                order.append(number)
                time.sleep(0.02)

    with turns.turn():
        threads = []
        for number in range(3):
            threads.append(threading.Thread(target=work, args=(number,)))
            threads[-1].start()
            go[number].wait()
            while len(turns._waiting) <= number:
                time.sleep(0.001)
    for thread in threads:
        thread.join()
    assert order == [0, 1, 2, 0, 1, 2]


def test_nothing_goes_to_the_temporary_folder(
    make_uploads: Callable[..., Uploads], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "tmp"
    elsewhere.mkdir()
    monkeypatch.setenv("TMPDIR", os.fspath(elsewhere))
    uploads = make_uploads()
    assert uploads.upload({"page.html": "<p>Hello.</p>"}).state == "done"
    assert list(elsewhere.iterdir()) == []


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
