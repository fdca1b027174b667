"""What an upload may take: no code of it runs, every limit is one line, and nobody waits for another's."""

from __future__ import annotations

import gzip
import json
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
from uploads import Text, Uploads, records

from rag_pipeline.server.errors import ApiError
from rag_pipeline.server.turns import Turns

IMPORTED = tuple(
    f"{name}.py"
    for name in (
        "ctypes", "encodings", "errno", "gzip", "json", "numpy", "pypdf", "rag_pipeline", "resource", "retrievers",
        "runpy", "sitecustomize", "tokenizers", "usercustomize", "zlib",
    )
)  # fmt: skip
"""What a worker imports, or would if it were there."""


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
    uploads = make_uploads()
    job = uploads.upload(dict.fromkeys(IMPORTED, code))
    assert (job.state, job.skipped) == ("done", [])
    assert not mark.exists()


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
    # A name alone: the time in a gzip header, say, would differ in each process that runs the suite.
    ids=["line", "many", "long", "title", "meta", "all", "deep", "empty", "broken"],
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


def text(count: int, word: str) -> str:
    """Short paragraphs of unlike words: a chunk each."""
    return "\n\n".join(f"{word} {number} " * 60 for number in range(count))


def test_an_index_has_a_quota_and_an_upload_may_replace_its_own_files(
    make_uploads: Callable[..., Uploads],
) -> None:
    uploads = make_uploads(max_index_chunks=20)
    first = uploads.upload({"a.txt": text(8, "one")})
    assert (first.state, first.skipped) == ("done", [])
    assert 8 <= first.chunks <= 12
    damaged = ("broken.jsonl.gz", b"not gzip")
    second = uploads.upload({"b.txt": text(40, "two"), "c.txt": "Small.", damaged[0]: damaged[1]})
    assert (second.state, second.documents) == ("done", 1)
    (skipped,) = [item for item in second.skipped if item["name"] != damaged[0]]
    (other,) = [item for item in second.skipped if item["name"] == damaged[0]]
    assert "--max-index-chunks" not in other["reason"]
    assert skipped["name"] == "b.txt"
    assert f"more than {19 - first.chunks} chunks" in skipped["reason"]
    assert "--max-index-chunks" in skipped["reason"]
    # The file itself makes room for its next version, and others do not.
    again = uploads.upload({"a.txt": text(8, "three")})
    assert (again.state, again.skipped) == ("done", [])
    assert uploads.upload({"d.txt": text(40, "four")}).state == "failed"
    for name in ("a.txt", "c.txt"):
        uploads.delete(f"uploads/{name}")
    assert uploads.upload({"d.txt": text(8, "five")}).state == "done"
    assert uploads.upload({"e.txt": text(40, "six")}, "globex").state == "failed"
    assert uploads.upload({"e.txt": "Small."}, "globex").state == "done"


def test_the_order_of_files_and_an_index_that_is_too_full_refuse_nothing_that_fits(
    make_uploads: Callable[..., Uploads],
) -> None:
    def restart(limit: int) -> None:
        uploads.jobs.close()
        uploads.settings = replace(uploads.settings, max_index_chunks=limit)
        uploads.start()

    uploads = make_uploads()
    assert uploads.upload({"a.txt": text(5, "one"), "b.txt": text(15, "two")}).state == "done"
    # As a whole they are no more than before; the first of them alone would be.
    restart(25)
    assert uploads.upload({"a.txt": text(14, "three"), "b.txt": text(5, "four")}).skipped == []
    # Filled from the command line, or under a higher limit: what makes no file larger is taken.
    restart(4)
    assert uploads.upload({"a.txt": text(10, "five")}).skipped == []
    failed = uploads.upload({"c.txt": text(2, "six")})
    assert failed.state == "failed"
    assert "more than 0 chunks" in failed.skipped[0]["reason"]


def test_an_upload_does_not_ask_those_who_search(make_uploads: Callable[..., Uploads]) -> None:
    uploads = make_uploads()
    assert uploads.upload({"a.txt": "A door."}).state == "done"
    # A reader met a fault that is over, and believes in it for a while.
    with (
        suppress(ApiError),
        mock.patch("retrievers.Index.open", side_effect=OSError(24, "too many files")),
    ):
        uploads.index().current()
    assert uploads.index().fault
    assert uploads.upload({"b.txt": "A window."}).state == "done"


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
