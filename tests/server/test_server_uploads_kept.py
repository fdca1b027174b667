"""Uploads outlive the server that accepted them, and what fails midway changes nothing."""

from __future__ import annotations

import errno
import json
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from uploads import Uploads, records

from rag_pipeline.server import parsing
from rag_pipeline.server.errors import ApiError
from rag_pipeline.server.ingest_jobs import IngestJobs
from rag_pipeline.server.parsing import ParseError
from retrievers import RetrievalError


def test_what_was_accepted_is_finished_by_the_next_server(
    make_uploads: Callable[..., Uploads],
) -> None:
    uploads = make_uploads()
    uploads.jobs._queues.put(
        "acme", uploads.jobs._queues._stop.wait
    )  # holds the queue until the server stops
    first = uploads.submit({"a.txt": "The first version."})
    second = uploads.submit({"a.txt": "The second version.", "b.md": "# B\n\nMore."})
    spool = uploads.folder / "spool"  # locks and records included
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (spool, *spool.rglob("*"))}
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
        uploads.jobs._queues.put(tenant, uploads.jobs._queues._stop.wait)
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
    uploads.jobs._queues.put("acme", uploads.jobs._queues._stop.wait)
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
    uploads.jobs._queues.put("acme", uploads.jobs._queues._stop.wait)
    job = uploads.submit({"a.txt": "Text."})
    other = IngestJobs(uploads.settings, spool=uploads.folder / "spool")
    try:
        assert other.resume(uploads.indexes) == 0
        with pytest.raises(ApiError):
            other.get("acme", job.id)
    finally:
        other.close()


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
