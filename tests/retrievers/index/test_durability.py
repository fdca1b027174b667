"""Crash at every call, and a fault at every call: the index is the old one or the new one, always.

The calls are those of a change that adds, replaces and removes documents, seen from between Python and
the disk; nothing of the index is replaced by a stand-in.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from rag_eval.io_faults import CHANGES, CrashRecorder, DiskCalls, Fault
from retrievers import (
    Document,
    Index,
    IndexBusyError,
    IngestProgress,
    StorageError,
    delete_documents,
    finish_removals,
    ingest,
)
from retrievers.journal import EmbeddingJournal, text_key

SECRET = "the old code of the vault is 4711"
BEFORE = [
    Document(id="a", title="", text=f"tea at one\n{SECRET}"),
    Document(id="b", title="", text="coffee at two"),
    Document(id="c", title="", text="water at three"),
]
AFTER = [
    Document(id="a", title="", text="tea at one\nthe vault has no code"),
    Document(id="b", title="", text="coffee at two"),
    Document(id="d", title="", text="juice at four"),
]


def texts(folder: Path) -> frozenset[str]:
    with Index.open(folder) as index:
        documents = {record.id for record in index.documents()}
        found = list(index.chunks())
        assert documents == {chunk.document_id for chunk in found}
        assert index.retriever("bm25").search("tea", k=1)[0].chunk.text == "tea at one"
        return frozenset(chunk.text for chunk in found)


def lines(documents: list[Document]) -> frozenset[str]:
    return frozenset(line for document in documents for line in document.text.split("\n"))


def holds(folder: Path, text: str) -> bool:
    return any(text.encode() in path.read_bytes() for path in folder.rglob("*") if path.is_file())


def leftovers(folder: Path) -> list[str]:
    """What belongs to no state: other generations, staged rows, files under a temporary name."""
    states = sorted(path.name for path in folder.glob("gen-*"))
    odd = [path.name for path in folder.rglob("*") if path.suffix in (".new", ".part")]
    staged = [str(path) for path in (folder / ".work").glob("stage/*")]
    return states[1:] + odd + staged


@pytest.fixture
def folder(tmp_path: Path, hash_embedder, splitter) -> Path:
    ingest(BEFORE, tmp_path / "index", splitter=splitter, embedder=hash_embedder)
    return tmp_path / "index"


@pytest.fixture
def change(hash_embedder, splitter) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        ingest(AFTER, folder, splitter=splitter, embedder=hash_embedder, sync=True)

    return run


def test_every_crash_leaves_the_old_state_or_the_new_one(
    folder: Path, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    with CrashRecorder(folder) as recorder:
        change(folder)
    # What was staged is nothing that an index is read from.
    images = {image.without(".work"): (when, image) for when, image in recorder.images()}
    seen = set()
    for number, (when, image) in enumerate(images.values()):
        left = tmp_path / f"image-{number}"
        image.restore(left)
        found = texts(left)
        assert found in (lines(BEFORE), lines(AFTER)), when
        seen.add(found)
        if number % 8 == 0:
            change(left)
            assert texts(left) == lines(AFTER)
            assert not leftovers(left), when
            assert not holds(left, SECRET), when
    assert len(seen) == 2
    for image in recorder.final():
        assert not any(SECRET.encode() in content for _, content in image.files)


def test_every_crash_of_a_first_ingest_leaves_no_index_or_a_whole_one(
    tmp_path: Path, hash_embedder, splitter
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    with CrashRecorder(home) as recorder:
        ingest(AFTER, home / "new" / "index", splitter=splitter, embedder=hash_embedder)
    seen = set()
    images = {image.without(".work"): when for when, image in recorder.images()}
    for number, (image, when) in enumerate(images.items()):
        left = tmp_path / f"image-{number}"
        image.restore(left)
        if (left / "new" / "index" / "manifest.json").exists():
            found = texts(left / "new" / "index")
        else:
            found = frozenset()
        assert found in (frozenset(), lines(AFTER)), when
        seen.add(found)
    assert len(seen) == 2
    for number, image in enumerate(set(recorder.final())):
        left = tmp_path / f"final-{number}"
        image.restore(left)
        assert texts(left / "new" / "index") == lines(AFTER)


@pytest.mark.parametrize(
    ("code", "lasting"),
    [(errno.EIO, False), (errno.ENOSPC, True), (errno.EROFS, True)],
    ids=["EIO once", "ENOSPC from then on", "EROFS from then on"],
)
def test_every_call_that_fails_is_one_line_and_leaves_one_whole_state(
    code: int, lasting: bool, folder: Path, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    kinds = CHANGES + (("unlink", "rmdir") if code == errno.EROFS and lasting else ())
    failures = 0
    for nth in range(1000):
        index = tmp_path / str(nth)
        shutil.copytree(folder, index)
        with DiskCalls(
            index, fault=Fault(kinds=kinds, nth=nth, errno=code, lasting=lasting)
        ) as disk:
            try:
                change(index)
                failed = None
            except StorageError as error:
                failed = error
        if not disk.failed:
            break
        failures += 1
        where = str(disk.failed[0])
        found = texts(index)
        assert found in (lines(BEFORE), lines(AFTER)), where
        if failed is None:
            # Only what nothing depends on may fail unsaid, and the change was made all the same.
            assert found == lines(AFTER), where
        else:
            assert failed.errno == code, where
            assert "\n" not in str(failed), where
            assert str(index) in str(failed), where
            assert ("as it was" in str(failed)) == (found == lines(BEFORE)), (where, str(failed))
        if found == lines(BEFORE) and not (lasting and code == errno.EROFS):
            assert not leftovers(index), where
        if nth % 6 == 0 or disk.failed[0].kind in ("fsync", "rename"):
            change(index)
            assert texts(index) == lines(AFTER), where
            assert not leftovers(index), where
            assert not holds(index, SECRET), where
    assert failures > 40


def test_a_delete_whose_old_files_stay_says_so_and_the_next_change_removes_them(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fault = Fault(kinds=("unlink",), nth=0, errno=errno.EIO, lasting=True)
    with DiskCalls(folder, fault=fault), pytest.raises(StorageError, match="may lie on the disk"):
        delete_documents(folder, ["a"])
    assert SECRET not in texts_of(folder)
    assert holds(folder, SECRET)
    with caplog.at_level(logging.WARNING):
        delete_documents(folder, ["c"])
    assert not holds(folder, SECRET)


def texts_of(folder: Path) -> list[str]:
    with Index.open(folder) as index:
        return [chunk.text for chunk in index.chunks()]


def test_documents_are_those_of_the_generation_that_was_opened(
    folder: Path, change: Callable[[Path], None]
) -> None:
    with Index.open(folder) as index:
        change(folder)
        assert [record.id for record in index.documents()] == ["a", "b", "c"]
        assert [record.id for record in index.documents()] == ["a", "b", "c"]


class Killed(BaseException):
    """Ends an ingest as a signal does that nothing catches: what is on the disk then is kept."""


@pytest.mark.parametrize("first", [False, True], ids=["a change", "a first ingest"])
def test_a_start_removes_what_a_killed_ingest_left_and_keeps_its_embeddings(
    first: bool, folder: Path, tmp_path: Path, hash_embedder, splitter
) -> None:
    index, left = tmp_path / ("new" if first else "index"), tmp_path / "left"

    def kill(state: IngestProgress) -> None:
        if state.stage == "write":
            shutil.copytree(index, left)
            raise Killed

    secret = Document(id="s", title="", text="the new code is 1234")
    before = len(hash_embedder.texts)
    with pytest.raises(Killed):
        ingest([secret], index, splitter=splitter, embedder=hash_embedder, progress=kill)
    (left / "manifest.json.new").write_text(secret.text)
    (left / ".lock").touch()
    if not first:
        shutil.rmtree(left / "gen-000002")  # as where it is killed before it begins to write
    assert holds(left / ".work" / "stage", secret.text)
    with FileLock(left / ".lock"):
        with pytest.raises(IndexBusyError):
            finish_removals(left)
        assert holds(left / ".work" / "stage", secret.text)
    finish_removals(left)
    assert not holds(left, secret.text)
    assert len(list(left.glob("gen-*"))) == (not first)
    if not first:
        assert texts(left) == lines(BEFORE)
    report = ingest([secret], left, splitter=splitter, embedder=hash_embedder)
    assert report.chunks_resumed == 1
    assert len(hash_embedder.texts) == before + 1


@pytest.mark.parametrize("has_index", [True, False])
def test_a_half_written_shard_of_a_journal_is_removed_and_whole_ones_stay(
    folder: Path, tmp_path: Path, has_index: bool
) -> None:
    index = folder if has_index else tmp_path / "first"
    journals = index / ".work" / "journal"
    EmbeddingJournal(journals, "f", 4).append([text_key("a")], np.ones((1, 4), np.float32))
    (index / ".lock").touch()
    half = journals / "f" / "new.part"
    half.write_bytes(b"half")
    finish_removals(index)
    assert not half.exists()
    assert text_key("a") in EmbeddingJournal(journals, "f", 4)


def test_a_start_leaves_a_folder_alone_in_which_nothing_was_ingested(tmp_path: Path) -> None:
    (tmp_path / "gen-000001").mkdir()
    (tmp_path / ".work" / "stage").mkdir(parents=True)
    finish_removals(tmp_path)
    finish_removals(tmp_path / "missing")
    assert (tmp_path / "gen-000001").exists()
    assert (tmp_path / ".work" / "stage").exists()
    assert not (tmp_path / "missing").exists()


@pytest.mark.parametrize("made_by_user", [False, True])
def test_an_index_is_for_its_owner_alone(
    made_by_user: bool, tmp_path: Path, hash_embedder, splitter
) -> None:
    index = tmp_path / "home" / "index"
    seen: dict[str, int] = {}

    def look(_: object = None) -> None:
        found = (path for path in index.rglob("*"))
        seen.update((f"{path.is_dir()} {path}", path.stat().st_mode & 0o777) for path in found)

    before = os.umask(0)
    try:
        if made_by_user:
            index.mkdir(mode=0o755, parents=True)
        ingest(AFTER, index, splitter=splitter, embedder=hash_embedder, progress=look)
        look()
    finally:
        os.umask(before)
    assert index.stat().st_mode & 0o777 == (0o755 if made_by_user else 0o700)
    assert any("stage" in name for name in seen)
    assert any("journal" in name for name in seen)
    odd = {n: oct(m) for n, m in seen.items() if m != (0o700 if n.startswith("True") else 0o600)}
    assert not odd
