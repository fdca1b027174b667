"""Names of uploaded files: what people call files is kept, what could lead elsewhere is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rag_pipeline.server.errors import ApiError
from rag_pipeline.server.file_names import file_of, safe_name


@pytest.mark.parametrize(
    "name",
    ["", " ", ".", "..", "../x.txt", "a/b.txt", "a\\b.txt", "/etc/passwd", "C:\\x", ".hidden", "x\0.txt",
     "x\n.txt", "x" * 300, "क" * 90, "\u202egpj.exe", "a\u2066b.txt", "a\u200fb.txt", "name.", " a.txt",
     "%2e%2e%2fx", "a%5Cb", "a%00.txt", "%2Eprofile", "a\ud800b", "~root", "a:b", "CON", "nul.txt", "Com1.md",
     "lpt\u00b9.txt", "aux .md", "a\u2028b", "a\u00adb", "a\u200bb", "\ufeffa.txt", "\u200d", "\u0301",
     "a\x7f.txt", "a\x85.txt", "data.jsonl#1", "x.json.gz#y.txt", "\U000e0041.txt"],
)  # fmt: skip
def test_names_that_could_lead_elsewhere_are_refused(name: str) -> None:
    with pytest.raises(ApiError, match=r"the file name .*") as error:
        safe_name(name)
    assert error.value.status == 400
    line = str(error.value)
    assert line.isascii()
    assert "\n" not in line


@pytest.mark.parametrize(
    "name",
    ["Guide 2.md", "data_set-3.jsonl.gz", "A (copy), final.html", "résumé.pdf", "日本語.txt", "報告／最終.txt",
     "हिन्दी रिपोर्ट.txt", "क्‍ष.txt", "คู่มือวาล์ว.txt", "தமிழ்.txt", "বাংলা.txt", "ភាសាខ្មែរ.txt", "မြန်မာ.txt", "བོད་ཡིག.txt",
     "മലയാളം.txt", "සිංහල.txt", "ਪੰਜਾਬੀ.txt", "ລາວ.txt", "مُلاحظات.txt", "می‌خواهم.txt", "שָׁלוֹם.txt", "አማርኛ.txt", "ᠮᠣᠩᠭᠣᠯ.txt",
     "Việt Nam.txt", "Ann’s notes – 2024.txt", "„Bericht“ — Endfassung.md", "«Отчёт».txt", "report [final] {2}.txt",
     "50% off.txt", "100%25.txt", "C# notes.txt", "#1.md", "a#1", "What is RAG?.pdf", "a*b.txt", "1 < 2 > 0.txt",
     "5 € + 3 £.txt", "x² ½.txt", "🎉 party 👩‍👩‍👧.md", "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f.txt", "🫨.txt",
     "☕️.txt", "conclusion.txt", "null.txt", "com10.txt", "notes.txt~", "PROGRA~1.TXT", "…and so on.txt", "-rf.txt",
     "pydoc-topics", "a…b.txt", "x" * 251 + ".txt"],
)  # fmt: skip
def test_names_that_people_give_are_kept(name: str) -> None:
    assert safe_name(name) == name


def test_both_spellings_of_a_letter_are_one_name() -> None:
    assert safe_name("re\u0301sume\u0301.pdf") == safe_name("résumé.pdf") == "résumé.pdf"


@given(st.text(max_size=60))
def test_an_allowed_name_stays_in_its_folder_and_is_its_own_file(name: str) -> None:
    try:
        kept = safe_name(name)
    except ApiError:
        return
    folder = Path("/srv/uploads")
    assert (folder / kept).resolve().parent == folder.resolve()
    assert Path(kept).name == kept
    assert file_of(f"uploads/{kept}") == kept


def test_a_record_belongs_to_its_file() -> None:
    for document_id, name in (
        ("uploads/a.jsonl#1", "a.jsonl"),
        ("uploads/a.JSON.GZ#x#y.jsonl#z", "a.JSON.GZ"),
        ("uploads/a.md#1", "a.md#1"),
        ("uploads/a.jsonl", "a.jsonl"),
        ("uploads/a.jsonl#", "a.jsonl#"),
        ("docs/a.jsonl#1", None),
        ("uploads", None),
    ):
        assert file_of(document_id) == name
