from __future__ import annotations

import os
from pathlib import Path

import pytest

from retrievers import LoadReport, RetrievalError, load_corpus
from retrievers.loaders import load_topics
from retrievers.loaders.globs import compile_globs


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "docs"
    for name in (
        "b.md",
        "a.txt",
        "sub/c.txt",
        "sub/deep/d.html",
        "readme",
        ".hidden.txt",
        ".git/x",
    ):
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"text of {name}")
    return root


def _paths(*sources: Path | str, **options: object) -> list[str | None]:
    return [document.path for document in load_corpus(list(sources), **options)]  # type: ignore[arg-type]


def test_a_folder_is_walked_sorted_without_hidden_files(folder: Path) -> None:
    report = LoadReport()
    documents = list(load_corpus([folder], report=report))
    expected = ["a.txt", "b.md", "readme", "sub/c.txt", "sub/deep/d.html"]
    assert [document.path for document in documents] == expected
    assert [document.id for document in documents] == [f"docs/{path}" for path in expected]
    assert (report.num_files, report.num_documents, report.num_skipped) == (5, 5, 0)


def test_no_name_of_a_file_stops_the_others(tmp_path: Path) -> None:
    names = [
        b"caf\xe9.txt", b"caf\xe8.txt", b"caf\\xe9.txt", b"two\nlines.md", b"tab\t.md", b" .txt",
        b"a.jsonl#1", b"\xf0\x9f\x94\xa7.txt", b"-.txt", b"bad\xff.pdf", "Prüfung.txt".encode(),
    ]  # fmt: skip
    for name in names:
        (tmp_path / os.fsdecode(name)).write_text("words")
    (tmp_path / "a.jsonl").write_text('{"id": 1, "text": "x"}')
    (tmp_path / os.fsdecode(b"dir\xe9")).mkdir()
    (tmp_path / os.fsdecode(b"dir\xe9") / "x.txt").write_text("words")
    report = LoadReport()
    documents = list(load_corpus([tmp_path], report=report))
    shown = {document.path for document in documents}
    assert {"caf\\xe9.txt", "caf\\xe8.txt", "two\\nlines.md", "dir\\xe9/x.txt", "🔧.txt"} <= shown
    assert len({document.id for document in documents}) == len(documents) == 10
    for text in [d.id + d.title for d in documents] + [s.path + s.reason for s in report.skipped]:
        assert text.encode().decode().isprintable()
    # The broken PDF, and the names that come to one id.
    assert report.num_skipped == 3
    assert sum("was given before; rename it" in skip.reason for skip in report.skipped) == 2
    with pytest.raises(RetrievalError, match=r"bad\\xff\.pdf: broken PDF"):
        list(load_corpus([tmp_path / os.fsdecode(b"bad\xff.pdf")]))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"include": ["*.txt"]}, ["a.txt", "sub/c.txt"]),
        ({"include": ["sub/**"]}, ["sub/c.txt", "sub/deep/d.html"]),
        ({"include": ["sub/*.txt", "*.md"]}, ["b.md", "sub/c.txt"]),
        ({"exclude": ["sub"]}, ["a.txt", "b.md", "readme"]),
        ({"exclude": ["deep/", "readme"]}, ["a.txt", "b.md", "sub/c.txt"]),
        ({"include": ["*.txt"], "exclude": ["sub/**"]}, ["a.txt"]),
        ({"include": ["[!a]*.txt"]}, ["sub/c.txt"]),
    ],
)
def test_patterns_choose_files(
    folder: Path, options: dict[str, list[str]], expected: list[str]
) -> None:
    assert _paths(folder, **options) == expected


def test_bad_patterns_are_refused_at_once(folder: Path) -> None:
    with pytest.raises(RetrievalError, match="empty file pattern"):
        load_corpus([folder], include=[" "])
    with pytest.raises(RetrievalError, match="give a list of patterns"):
        load_corpus([folder], exclude="*.md")
    assert not compile_globs(["a.c"])("abc")
    assert compile_globs(["**/x/*.md"])("x/a.md")


def test_links_that_loop_or_repeat_are_read_once(folder: Path) -> None:
    (folder / "sub" / "loop").symlink_to(folder, target_is_directory=True)
    (folder / "z_again.txt").symlink_to(folder / "a.txt")
    (folder / "z_broken.txt").symlink_to(folder / "none.txt")
    report = LoadReport()
    paths = [document.path for document in load_corpus([folder], report=report)]
    assert paths == ["a.txt", "b.md", "readme", "sub/c.txt", "sub/deep/d.html"]
    assert [skip.path for skip in report.skipped] == ["z_broken.txt"]


def test_unreadable_files_are_skipped_and_counted(folder: Path) -> None:
    (folder / "picture.png").write_bytes(b"\x89PNG\0\0")
    (folder / "broken.pdf").write_bytes(b"%PDF-1.4")
    os.mkfifo(folder / "pipe")
    report = LoadReport()
    assert len(list(load_corpus([folder], report=report))) == 5
    reasons = {skip.path: skip.reason for skip in report.skipped}
    assert set(reasons) == {"picture.png", "broken.pdf", "pipe"}
    assert reasons["picture.png"].startswith("binary file")
    assert report.num_skipped == 3


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_files_without_permission_are_skipped(folder: Path) -> None:
    (folder / "a.txt").chmod(0)
    report = LoadReport()
    assert len(list(load_corpus([folder], report=report))) == 4
    assert report.skipped[0].path == "a.txt"


def test_a_folder_with_nothing_to_read_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(RetrievalError, match="no file to load in"):
        list(load_corpus([tmp_path]))
    (tmp_path / "x.bin").write_bytes(b"\0\1")
    (tmp_path / "y.bin").write_bytes(b"\0\1")
    with pytest.raises(RetrievalError, match=r"nothing could be read from .*x\.bin.*and 1 more"):
        list(load_corpus([tmp_path]))
    (tmp_path / "z.txt").write_text("text")
    with pytest.raises(RetrievalError, match="include and exclude"):
        list(load_corpus([tmp_path], include=["*.md"]))


def test_missing_sources_are_refused_before_anything_is_read(folder: Path) -> None:
    with pytest.raises(RetrievalError, match="no such file or folder"):
        load_corpus([folder, folder / "none"])
    with pytest.raises(RetrievalError, match="nothing to load"):
        load_corpus([])


def test_two_folders_never_share_an_id(tmp_path: Path) -> None:
    for parent in ("one", "two"):
        (tmp_path / parent / "docs").mkdir(parents=True)
        (tmp_path / parent / "docs" / "x.txt").write_text(parent)
    both = list(load_corpus([tmp_path / "one" / "docs", tmp_path / "two" / "docs"]))
    assert [document.id for document in both] == ["one/docs/x.txt", "two/docs/x.txt"]
    alone = list(load_corpus([tmp_path / "one" / "docs"]))
    assert [document.id for document in alone] == ["docs/x.txt"]


def test_overlapping_sources_are_read_once(folder: Path) -> None:
    assert _paths(folder / "sub", folder / "sub" / "c.txt", folder) == [
        "c.txt", "deep/d.html", "a.txt", "b.md", "readme",
    ]  # fmt: skip


def test_a_relative_folder_gives_the_ids_of_its_full_path(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = [document.id for document in load_corpus([folder])]
    monkeypatch.chdir(folder)
    assert [document.id for document in load_corpus(["."])] == full


def test_the_language_reference_is_a_named_corpus(folder: Path) -> None:
    report = LoadReport()
    documents = list(load_corpus(["pydoc-topics", folder], report=report))
    topics = documents[:-5]
    assert len(topics) > 60
    assert topics == list(load_topics())
    assert topics == sorted(topics, key=lambda document: document.title)
    assert {"assert", "lambda"} <= {document.title for document in topics}
    assert topics[0].id == f"pydoc-topics/{topics[0].title}"
    assert topics[0].path is None
    assert report.num_documents == len(documents)
