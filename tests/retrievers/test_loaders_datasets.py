from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

from retrievers import Document, LoadReport, RetrievalError, load_file

_DATA = Path(
    os.environ.get("RAG_PIPELINE_TEST_DATA", Path(__file__).parents[3] / "shared" / "data")
)


def _load(path: Path, content: object) -> tuple[list[Document], LoadReport]:
    if path.suffix == ".json":
        path.write_text(json.dumps(content))
    else:
        assert isinstance(content, list)
        path.write_text("\n".join(json.dumps(record) for record in content))
    report = LoadReport()
    return list(load_file(path, report=report)), report


_RECORDS: dict[str, tuple[object, list[tuple[str, str]]]] = {
    "ctxs": (
        [{"question": "q", "answers": ["a"], "ctxs": [{"title": "T", "text": "x"}, {"text": "y"}]}],
        [("T", "x"), ("set", "y")],
    ),
    "hotpotqa": (
        [{"question": "q", "context": [["T", ["One.", " Two."]], ["U", ["One.", "Two."]]]}],
        [("T", "One. Two."), ("U", "One. Two.")],
    ),
    "hotpotqa columns": (
        [{"context": {"title": ["T", "U"], "sentences": [["One."], ["Two."]]}}],
        [("T", "One."), ("U", "Two.")],
    ),
    "squad": (
        {"version": "1.1", "data": [{"title": "Big_City", "paragraphs": [
            {"context": "c1", "qas": []}, {"context": "c2", "qas": []}]}]},
        [("Big City", "c1"), ("Big City", "c2")],
    ),
    "musique": (
        [{"id": "2hop", "paragraphs": [{"idx": 0, "title": "T", "paragraph_text": "p"}]}],
        [("T", "p")],
    ),
    "corpus": (
        [{"id": "7", "contents": '"A title"\nThe body\nof it'}, {"id": "8", "contents": "bare"}],
        [("A title", "The body\nof it"), ("set", "bare")],
    ),
    "generic": ([{"text": "x", "title": "T"}, {"text": "y"}], [("T", "x"), ("set", "y")]),
}  # fmt: skip


@pytest.mark.parametrize("shape", _RECORDS)
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_passages_of_every_shape_become_documents(tmp_path: Path, shape: str, suffix: str) -> None:
    content, expected = _RECORDS[shape]
    if suffix == ".jsonl" and not isinstance(content, list):
        content = [content]
    documents, report = _load(tmp_path / f"set{suffix}", content)
    assert [(document.title, document.text) for document in documents] == expected
    assert len({document.id for document in documents}) == len(documents)
    assert {document.path for document in documents} == {str(tmp_path / f"set{suffix}")}
    assert (report.num_documents, report.num_skipped) == (len(expected), 0)


def test_equal_passages_are_one_document_and_ids_follow_the_content(tmp_path: Path) -> None:
    one = {"ctxs": [{"title": "T", "text": "x"}, {"title": "T", "text": "y"}]}
    two = {"ctxs": [{"title": "T", "text": "y"}, {"title": "U", "text": "y"}]}
    documents, report = _load(tmp_path / "a.json", [one, two])
    assert [(d.title, d.text) for d in documents] == [("T", "x"), ("T", "y"), ("U", "y")]
    assert report.num_duplicates == 1
    again, _ = _load(tmp_path / "a.json", [two, one])
    assert {d.id for d in again} == {d.id for d in documents}


def test_ids_and_metadata_of_a_record_are_kept(tmp_path: Path) -> None:
    record = {
        "id": 12, "text": "x", "title": "T",
        "metadata": {"year": 2020, "tags": ["a"], "none": None, "ok": True},
    }  # fmt: skip
    documents, _ = _load(tmp_path / "a.jsonl", [record])
    assert documents[0].id == f"{tmp_path.name}/a.jsonl#12"
    assert documents[0].metadata == {
        "format": "jsonl", "year": 2020, "tags": '["a"]', "ok": True,
    }  # fmt: skip


def test_equal_texts_with_other_ids_or_metadata_are_all_kept(tmp_path: Path) -> None:
    documents, report = _load(
        tmp_path / "a.jsonl",
        [
            {"id": "N", "text": "x", "metadata": {"shop": "north"}},
            {"id": "S", "text": "x", "metadata": {"shop": "south"}},
            {"id": "T", "text": "x", "metadata": {"shop": "south"}},
            {"text": "x", "metadata": {"shop": "east"}},
            {"text": "x", "metadata": {"shop": "west"}},
            {"id": "N", "text": "x", "metadata": {"shop": "north"}},
            {"text": "x", "metadata": {"shop": "west"}},
        ],
    )
    shops = [document.metadata["shop"] for document in documents]
    assert shops == ["north", "south", "south", "east", "west"]
    assert len({document.id for document in documents}) == 5
    assert (report.num_duplicates, report.num_skipped) == (2, 0)


def test_no_record_stops_those_behind_it(tmp_path: Path) -> None:
    lines = [
        '{"version": 1}', '{"id": 1, "text": "one", "title": 5}', "9" * 5000,
        '{"text": "two", "metadata": {"n": NaN, "i": 1e999, "d": {"k": [null]}}}',
        '{"text": "x", "metadata": [1]}', '{"text": null}', '{"id": [1], "text": "three"}',
        '{"id": "\\ud800", "text": "four"}',
    ]  # fmt: skip
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    report = LoadReport()
    documents = list(load_file(tmp_path / "a.jsonl", report=report))
    assert [document.text for document in documents] == ["one", "two", "three", "four"]
    assert documents[1].metadata == {"format": "jsonl", "i": "inf", "d": '{"k": [null]}'}
    assert [int(skip.path.rsplit(":", 1)[1]) for skip in report.skipped] == [1, 3, 5, 6]
    (tmp_path / "a.json").write_text("[" + "9" * 5000 + "]")
    with pytest.raises(RetrievalError, match="not JSON"):
        list(load_file(tmp_path / "a.json"))


def test_bad_lines_are_skipped_counted_and_named(tmp_path: Path) -> None:
    lines = [
        '{"id": "1", "text": "good"}', "{broken", '{"id": "2", "text": 5}', '{"no": "text"}',
        '{"id": "1", "text": "other"}', "", '{"id": "3", "text": "bad \\ud800 escape"}', "[1]",
    ]  # fmt: skip
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    report = LoadReport()
    documents = list(load_file(tmp_path / "a.jsonl", report=report))
    assert [document.text for document in documents] == ["good", "bad \ufffd escape"]
    assert [skip.path.rsplit(":", 1)[1] for skip in report.skipped] == ["2", "3", "4", "5", "8"]
    reasons = [skip.reason for skip in report.skipped]
    assert "not JSON" in reasons[0]
    assert "expected a string, got int" in reasons[1]
    assert "id '1' was used before" in reasons[3]


def test_lines_are_read_one_at_a_time(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        for i in range(50_000):
            file.write(json.dumps({"id": i, "contents": f"t{i}\nbody {i}"}) + "\n")
    stream = load_file(tmp_path / "a.jsonl.gz")
    assert next(stream).text == "body 0"
    # Cutting the file now cannot be noticed by a reader that took it whole.
    payload = (tmp_path / "a.jsonl.gz").read_bytes()
    with (tmp_path / "a.jsonl.gz").open("r+b") as file_:
        file_.truncate(len(payload) // 2)
    assert 0 < sum(1 for _ in stream) < 49_999


def test_a_question_file_without_passages_says_what_is_known(tmp_path: Path) -> None:
    with pytest.raises(RetrievalError, match=r"no passages in this record; known: .*SQuAD"):
        _load(tmp_path / "a.jsonl", [{"id": "1", "question": "q", "golden_answers": ["a"]}])


@pytest.mark.skipif(
    not _DATA.is_dir(), reason=f"no data folder at {_DATA}: set RAG_PIPELINE_TEST_DATA"
)
@pytest.mark.parametrize(
    ("name", "least", "kind"),
    [
        ("hotpotqa/hotpot_200.json", 1900, "hotpotqa"),
        ("musique/musique_s_first100.json", 800, "ctxs"),
        ("xquad/xquad.en.first24.json", 100, "squad"),
        ("lost_in_the_middle/nq-open-oracle.jsonl.gz", 2500, "ctxs"),
    ],
)  # fmt: skip
def test_real_files_give_their_passages(name: str, least: int, kind: str) -> None:
    if not (_DATA / name).is_file():
        pytest.skip(f"{name} is not in the data folder")
    report = LoadReport()
    documents = list(load_file(_DATA / name, report=report))
    assert len(documents) == report.num_documents >= least
    assert report.num_skipped == 0
    assert len({document.id for document in documents}) == len(documents)
    assert len({(document.title, document.text) for document in documents}) == len(documents)
    assert all(document.text.strip() and document.title for document in documents)
    assert {document.metadata["format"] for document in documents} == {kind}
