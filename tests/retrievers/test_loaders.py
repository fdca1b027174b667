from __future__ import annotations

import codecs
from pathlib import Path

import pytest

from retrievers import Document, LoadReport, RetrievalError, load_file
from retrievers.loaders.html import html_to_text
from retrievers.loaders.markdown import markdown_to_text


def _only(path: Path) -> Document:
    documents = list(load_file(path))
    assert len(documents) == 1
    return documents[0]


@pytest.mark.parametrize(
    "payload",
    [
        "Zoë's café — naïve".encode(),
        "Zoë's café — naïve".encode("utf-8-sig"),
        codecs.BOM_UTF16_LE + "Zoë's café — naïve".encode("utf-16-le"),
        codecs.BOM_UTF16_BE + "Zoë's café — naïve".encode("utf-16-be"),
        "Zoë's café — naïve".encode("utf-32"),
    ],
)
def test_text_is_decoded_by_mark_or_as_utf8(tmp_path: Path, payload: bytes) -> None:
    (tmp_path / "notes.txt").write_bytes(payload)
    document = _only(tmp_path / "notes.txt")
    assert document.text == "Zoë's café — naïve"
    assert document.title == "notes"
    assert document.metadata == {"format": "txt"}


def test_text_in_an_old_encoding_is_recognised(tmp_path: Path) -> None:
    text = "Die Übung für Größe und Straße: schöne Grüße aus Köln, während ältere Männer hören. "
    (tmp_path / "alt.txt").write_bytes((text * 20).encode("cp1252"))
    assert _only(tmp_path / "alt.txt").text == text * 20


def test_line_ends_and_nul_are_normalised(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\rthree\n")
    assert _only(tmp_path / "a.txt").text == "one\ntwo\nthree\n"


@pytest.mark.parametrize(
    ("name", "payload", "reason"),
    [
        ("a.txt", b"\x7fELF\x00\x01\x02", "binary file"),
        ("a.png", b"\x89PNG\r\n\x1a\n" + bytes(range(256)), "binary file"),
        ("a.txt", b"\x01\x02\x03\x04 x", "binary file"),
        ("a.txt", codecs.BOM_UTF16_LE + b"\x00\xd8A", "not valid utf-16"),
        ("a.txt", b" \n\t ", "holds no text"),
        ("a.md", b"", "holds no text"),
        ("a.html", b"<script>x</script>", "holds no text"),
        ("a.pdf", b"%PDF-1.4 nothing", "broken PDF"),
        ("a.pdf", b"", "broken PDF"),
        ("a.json", b"{", "not JSON"),
        ("a.json", b"[" * 100_000, "not JSON"),
        ("a.json", b"[]", "no passage with text"),
        ("a.json", b'[{"question": "q"}]', "no passages in this record"),
        ("a.jsonl", b'{"question": "q"}\n', "no passages in this record"),
        ("a.jsonl", b"\x00\x01\x02\n", "binary file"),
        ("a.jsonl", b"", "no passage with text"),
        ("a.jsonl.gz", b"plain", "broken gzip"),
        ("a.json.gz", b"plain", "broken gzip"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_clear_line(
    tmp_path: Path, name: str, payload: bytes, reason: str
) -> None:
    (tmp_path / name).write_bytes(payload)
    report = LoadReport()
    with pytest.raises(RetrievalError, match=reason) as caught:
        list(load_file(tmp_path / name, report=report))
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)
    assert report.num_files == 0
    assert report.num_skipped >= 1


def test_a_missing_file_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(RetrievalError, match="no such file"):
        load_file(tmp_path / "none.txt")


_MARKDOWN = """---
title: "From the front"
---
Intro *with* [a link](http://x.y) and `code`.

# The **Title**

- one
- two
  - deep

1. first
2. second

```python
def f(x):

    return x  # kept
```

| a | b |
|---|---|
| 1 | 2 |

![a picture](p.png)

<div>inside <b>html</b></div>
"""


def test_markdown_keeps_what_a_reader_sees() -> None:
    text, title = markdown_to_text(_MARKDOWN)
    assert title == "The Title"
    assert text.split("\n\n") == [
        "Intro with a link and code.",
        "The Title",
        "- one\n- two\n  - deep",
        "1. first\n2. second",
        "    def f(x):",
        "        return x  # kept",
        "a | b\n1 | 2",
        "a picture",
        "inside html",
    ]


def test_markdown_title_falls_back_to_front_matter_then_stem(tmp_path: Path) -> None:
    assert markdown_to_text("---\ntitle: From the front\n---\nText")[1] == "From the front"
    (tmp_path / "stem.md").write_text("Just text, with a rule\n\n---\n\nand more")
    document = _only(tmp_path / "stem.md")
    assert document.title == "stem"
    assert document.text == "Just text, with a rule\n\nand more"


def test_markdown_nested_deeply_is_read() -> None:
    markup = "".join("  " * depth + f"- item {depth}\n" for depth in range(40))
    text, _ = markdown_to_text(markup)
    assert [line.strip() for line in text.splitlines()] == [f"- item {i}" for i in range(40)]


def test_markdown_loses_no_word_of_loose_and_nested_lists() -> None:
    markup = "1. one\n\n   more of one\n\n2. two\n\n       code()\n\n> - quoted\n>\n> end\n"
    text, _ = markdown_to_text(markup)
    for part in ("1. one", "more of one", "2. two", "    code()", "- quoted", "end"):
        assert part in text


_HTML = """<!doctype html><html><head><title> The
 Page </title><style>p{}</style></head><body><nav>Home | About</nav>
<h1>Heading</h1><p>One <b>bold</b>ly
wrapped line.<br>Next.</p><script>evil()</script><!-- hidden -->
<ul><li>first</li><li>second <i>x</i></li></ul>
<table><tr><th>a</th><th>b</th></tr><tr><td>1</td><td>2</td></tr></table>
<pre>
def f():
    return 1
</pre><div>tail &amp; <span>end</span></div></body></html>"""


def test_html_keeps_what_a_reader_sees(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(_HTML)
    document = _only(tmp_path / "page.html")
    assert document.title == "The Page"
    assert document.text.split("\n\n") == [
        "Heading",
        "One boldly wrapped line.\nNext.",
        "- first\n- second x",
        "a | b\n1 | 2",
        "    def f():\n        return 1",
        "tail & end",
    ]


def test_html_title_falls_back_to_the_heading_and_deep_nesting_is_read() -> None:
    assert html_to_text("<h1>Big <i>one</i></h1><p>x")[1].split() == ["Big", "one"]
    text, _ = html_to_text("<div>" * 5000 + "deep" + "</div>" * 5000)
    assert text == "deep"


def _write_pdf(path: Path, *, title: str = "", password: str | None = None) -> None:
    canvas = pytest.importorskip("reportlab.pdfgen.canvas", reason="reportlab is a dev extra")
    from reportlab.lib.pdfencrypt import StandardEncryption

    encryption = StandardEncryption(password, ownerPassword="o") if password is not None else None
    page = canvas.Canvas(str(path), encrypt=encryption)
    if title:
        page.setTitle(title)
    page.drawString(72, 700, "First page speaks.")
    page.showPage()
    page.drawString(72, 700, "Second page answers.")
    page.save()


def test_pdf_gives_text_title_and_page_count(tmp_path: Path) -> None:
    _write_pdf(tmp_path / "a.pdf", title="A  Report")
    document = _only(tmp_path / "a.pdf")
    assert document.title == "A Report"
    assert document.text.split("\n\n") == ["First page speaks.", "Second page answers."]
    assert document.metadata == {"format": "pdf", "pages": 2}


def test_an_encrypted_pdf_is_refused_unless_its_password_is_empty(tmp_path: Path) -> None:
    _write_pdf(tmp_path / "open.pdf", password="")
    assert "First page" in _only(tmp_path / "open.pdf").text
    _write_pdf(tmp_path / "shut.pdf", password="secret")
    with pytest.raises(RetrievalError, match="encrypted PDF; save it without a password"):
        list(load_file(tmp_path / "shut.pdf"))


def test_a_pdf_cut_in_half_or_without_text_is_refused(tmp_path: Path) -> None:
    _write_pdf(tmp_path / "a.pdf")
    payload = (tmp_path / "a.pdf").read_bytes()
    (tmp_path / "cut.pdf").write_bytes(payload[: len(payload) // 3])
    with pytest.raises(RetrievalError, match=r"broken PDF|without a text layer"):
        list(load_file(tmp_path / "cut.pdf"))
    from reportlab.pdfgen.canvas import Canvas

    blank = Canvas(str(tmp_path / "blank.pdf"))
    blank.rect(10, 10, 50, 50)
    blank.save()
    with pytest.raises(RetrievalError, match="without a text layer"):
        list(load_file(tmp_path / "blank.pdf"))
