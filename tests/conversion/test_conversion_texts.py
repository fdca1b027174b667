"""Text to calibrate on and text to measure on: read, cut, and kept apart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rag_pipeline.conversion import ConversionError
from rag_pipeline.conversion.texts import CORPUS, paragraphs, read_text, read_windows, windows_of


def encode(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def read(calibration: list[Path | str], held_out: list[Path | str], least: int = 1) -> object:
    return read_windows(
        [str(path) for path in calibration],
        [str(path) for path in held_out],
        encode,
        start=[1],
        length=21,
        tokens=10_000,
        held_out_tokens=100,
        least=least,
    )


def test_windows_begin_as_the_model_expects_and_lie_evenly_apart() -> None:
    text = "".join(chr(100 + at) for at in range(47))
    all_of_it = windows_of("a", [text], encode, start=[1], length=11, tokens=1000)
    assert [row[:2] for row in all_of_it.rows] == [(1, 100), (1, 110), (1, 120), (1, 130)]
    assert all_of_it.tokens == 44
    some = windows_of("a", [text], encode, start=[1], length=11, tokens=22)
    assert [row[1] for row in some.rows] == [100, 120]


def test_windows_never_reach_from_one_text_into_the_next() -> None:
    found = windows_of("a", ["a" * 15, "b" * 25], encode, start=[], length=10, tokens=1000)
    assert [set(row) for row in found.rows] == [{ord("a")}, {ord("b")}, {ord("b")}]


def test_json_lines_are_strings_or_objects(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('"one"\n\n{"text": "two"}\n{"prompt": "three"}\n', "utf-8")
    assert paragraphs(read_text(str(file), held_out=False)) == ["one", "two", "three"]


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("a.jsonl", b"{", "line 1 .* no JSON"),
        ("a.jsonl", b'"x"\n{"other": 1}', "line 2 .* no text"),
        ("a.txt", b"\xff\xfe", "cannot be read"),
        ("a.txt", b" \n", "is empty"),
        ("", b"", "cannot be read"),
    ],
)
def test_a_file_that_holds_no_text_is_refused(
    tmp_path: Path, name: str, content: bytes, named: str
) -> None:
    file = tmp_path / name
    if name:
        file.write_bytes(content)
    with pytest.raises(ConversionError, match=named):
        read_text(str(file), held_out=False)


def test_the_two_parts_of_the_built_in_corpus_have_nothing_in_common() -> None:
    parts = [set(paragraphs(read_text(CORPUS, held_out=held))) for held in (False, True)]
    assert {len(block) > 500 for block in parts[0] | parts[1]} == {True, False}
    assert not {block for block in parts[0] & parts[1] if len(block) > 500}


def test_paragraphs_that_were_calibrated_on_are_not_measured_on(tmp_path: Path) -> None:
    shared = "This paragraph is in both of the texts, wherever its lines end."
    own = "And this one is only in the text that perplexity is measured on."
    (tmp_path / "a.txt").write_text(f"Something else.\n\n{shared}\n\n" + "x" * 99, "utf-8")
    (tmp_path / "b.txt").write_text(f"{shared.replace(' ', chr(10), 3)}\n\n{own}", "utf-8")
    _, measured = read([tmp_path / "a.txt"], [tmp_path / "b.txt"])  # type: ignore[misc]
    seen = "".join(chr(token) for row in measured[0].rows for token in row[1:])
    assert own.startswith(seen)
    assert measured[0].name == "b"


def test_a_text_that_is_all_calibrated_on_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text(json.dumps("This paragraph is in the one text that there is.") * 9, "utf-8")
    with pytest.raises(ConversionError, match="not in the calibration text"):
        read([file], [file])


def test_too_little_calibration_text_is_refused_with_both_numbers(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("x" * 50, "utf-8")
    with pytest.raises(ConversionError, match=r"gives 42 tokens .* at least 100"):
        read([file], [CORPUS], least=100)
