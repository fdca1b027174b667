"""PDF pages that are damaged, filled in or commented on; the files are written by hand."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest

from retrievers import LoadReport, RetrievalError, load_file


def _pdf(pages: list[tuple[bytes, bytes]], *, annotations: list[bytes] = []) -> bytes:  # noqa: B006
    """Write pages of (content, entries of its stream); the annotations stand on the first."""
    objects = {
        1: b"<< /Type /Catalog /Pages 2 0 R /AcroForm << /Fields [] >> >>",
        3: b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>",
    }
    kids = b""
    for i, (content, entries) in enumerate(pages):
        number = 100 + 2 * i
        kids += b"%d 0 R " % number
        notes = b" ".join(b"%d 0 R" % (10 + n) for n in range(len(annotations))) if not i else b""
        objects[number] = (
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Resources << /Font << /F1 3 0 R"
            b" >> >> /Contents %d 0 R /Annots [%s] >>" % (number + 1, notes)
        )
        objects[number + 1] = b"<< /Length %d %s >>\nstream\n%s\nendstream" % (
            len(content), entries, content,
        )  # fmt: skip
    objects[2] = b"<< /Type /Pages /Count %d /Kids [%s] >>" % (len(pages), kids)
    objects |= {10 + n: annotation for n, annotation in enumerate(annotations)}
    out, offsets = b"%PDF-1.7\n", {}
    for number, body in sorted(objects.items()):
        offsets[number] = len(out)
        out += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    start, size = len(out), max(objects) + 1
    out += b"xref\n0 %d\n0000000000 65535 f \n" % size
    for number in range(1, size):
        out += b"%010d 0000%s \n" % (
            offsets.get(number, 0),
            b"0 n" if number in offsets else b"1 f",
        )
    return out + b"trailer\n<< /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (size, start)


def _line(words: bytes) -> bytes:
    return b"BT /F1 12 Tf 72 700 Td (%s) Tj ET" % words


def _load(path: Path, payload: bytes) -> tuple[str, LoadReport]:
    path.write_bytes(payload)
    report = LoadReport()
    return next(iter(load_file(path, report=report))).text, report


_PACKED = zlib.compress(_line(b"lost") + b"% padding" * 400)


@pytest.mark.parametrize(
    ("content", "entries"),
    [
        (_line(b"lost"), b"/Filter /FooDecode"),
        (b"BT /F1 12 Tf (open Tj ET <<", b""),
        (b"not zlib", b"/Filter /FlateDecode"),
        (_PACKED[:-12], b"/Filter /FlateDecode"),
        (_PACKED[:30], b"/Filter /FlateDecode"),
    ],
)
def test_a_page_that_cannot_be_read_is_told_and_the_others_stay(
    tmp_path: Path, content: bytes, entries: bytes
) -> None:
    pages = [(_line(b"One."), b""), (content, entries), (_line(b"Three."), b"")]
    text, report = _load(tmp_path / "a.pdf", _pdf(pages))
    assert text.startswith("One.")
    assert text.endswith("Three.")
    assert report.num_skipped == 1
    assert report.skipped[0].reason.startswith("page 2: ")
    assert "\n" not in report.skipped[0].reason


def test_a_file_of_damaged_pages_is_broken_not_without_text(tmp_path: Path) -> None:
    with pytest.raises(RetrievalError, match="broken PDF"):
        _load(tmp_path / "a.pdf", _pdf([(b"not zlib", b"/Filter /FlateDecode")]))


_FIELDS = {
    "text": (b"/FT /Tx /T (serial) /V (SN-4711-B)", "serial: SN-4711-B"),
    "labelled": (b"/FT /Tx /T (f1) /TU (Serial number) /V (SN)", "Serial number: SN"),
    "UTF-16": (b"/FT /Tx /T (f) /V <FEFF004D00FC>", "f: Mü"),
    "choice by code": (b"/FT /Ch /T (c) /V (de) /Opt [[(de) (German)] [(en) (English)]]", "c: German"),
    "several choices": (b"/FT /Ch /T (c) /V [(a) (b)]", "c: a, b"),
    "ticked": (b"/FT /Btn /T (agree) /V /Yes /AS /Yes", "agree: Yes"),
    "not ticked": (b"/FT /Btn /T (agree) /V /Off /AS /Off", ""),
    "push button": (b"/FT /Btn /Ff 65536 /MK << /CA (Send) >>", "Send"),
    "password": (b"/FT /Tx /Ff 8192 /T (p) /V (secret)", ""),
    "hidden": (b"/FT /Tx /F 2 /T (h) /V (unseen)", ""),
    "empty": (b"/FT /Tx /T (serial)", ""),
    "child": (b"/T (no) /Parent << /FT /Tx /T (serial) /V (7) >>", "serial.no: 7"),
}  # fmt: skip


@pytest.mark.parametrize("name", _FIELDS)
def test_what_is_filled_in_is_read(tmp_path: Path, name: str) -> None:
    entries, expected = _FIELDS[name]
    widget = b"<< /Type /Annot /Subtype /Widget /Rect [0 0 9 9] %s >>" % entries
    payload = _pdf([(_line(b"Form"), b"")], annotations=[widget])
    assert _load(tmp_path / "a.pdf", payload)[0].removeprefix("Form").strip() == expected


def test_comments_are_read_and_a_broken_one_does_not_hide_them(tmp_path: Path) -> None:
    annotations = [
        b"<< /Subtype /FreeText /Contents (Typed on the page) >>",
        b"<< /Subtype /Text /Contents (A note) /F (x) >>",
        b"<< /Subtype /Highlight /Contents (Mind this) >>",
        b"<< /Subtype /Popup /Contents (Mind this) >>",
        b"<< /Subtype /Link /Contents (go) >>",
        b"null",
    ]
    payload = _pdf([(_line(b"P"), b"")], annotations=annotations)
    text, report = _load(tmp_path / "a.pdf", payload)
    assert "page 1: not all of it read (an annotation is broken" in report.skipped[0].reason
    assert text == "P\nTyped on the page\nMind this"
