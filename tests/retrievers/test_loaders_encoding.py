"""Bytes to text: right, or refused with a reason; never a wrong letter without a word."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from retrievers import LoadReport, RetrievalError, load_file
from retrievers.loaders.encoding import decode

_WRITTEN = {
    "cp1252": (
        "Die Prüfung kostet 20 € – „schön“ sagte Jürgen Müller.",
        "Le café de l'hôtel est fermé à Noël; les élèves sont là.",
        "El año pasado, la señora Núñez compró un piano pequeño.",
        "Ventilen öppnas vid åtta bar och måste kontrolleras varje år.",
        "The company’s “new” price is £20 – that’s final.",
        "La città è più calda perché l'estate è già qui.",
        "A válvula abre a oito bar; a inspeção é feita todos os anos.",
        "Temperature 20 °C",
        "café",
    ),
    "cp1250": ("Zażółć gęślą jaźń", "Łódź", "Ellenőrzés évente kötelező, nyolc bárnál nyílik."),
    "iso8859-2": ("Příliš žluťoučký kůň úpěl ďábelské ódy",),
    "cp1251": ("Клапан открывается при восьми барах.", "Ціна їжі в Києві"),
    "koi8-r": ("Привет, мир", "Проверка давления в системе"),
    "cp866": ("Клапан открывается при восьми барах.",),
    "cp1253": ("Η βαλβίδα ανοίγει στα οκτώ μπαρ.",),
    "cp1254": ("Vana sekiz barda açılır ve her yıl kontrol edilir.",),
    "cp1255": ("שלום עולם, השסתום נפתח",),
    "cp1256": ("مرحبا بالعالم، الصمام يفتح",),
    "cp874": ("กรุณาตรวจสอบวาล์วทุกปี",),
    "gb18030": ("压力阀在八巴时打开。请每年进行维护。",),
    "big5": ("壓力閥在八巴時打開。請每年進行維護。",),
    "cp932": ("バルブは八バールで開きます。",),
    "euc_jp": ("日本語のテキスト",),
    "cp949": ("밸브는 팔 바에서 열립니다.",),
    "iso2022_jp": ("バルブは八バールで開きます。",),
    "utf-16-le": ("Zoë reads.\nThe valve opens.", "阀门 打开\n请每年"),
    "utf-16-be": ("Zoë reads.\nThe valve opens.",),
    "utf-32-le": ("Zoë reads.\nThe valve opens.",),
}


@pytest.mark.parametrize(("encoding", "text"), [(e, t) for e, ts in _WRITTEN.items() for t in ts])
def test_an_old_encoding_is_read_right_and_named(encoding: str, text: str) -> None:
    report = LoadReport()
    assert decode(text.encode(encoding), "f.txt", report=report) == text
    assert encoding == "iso2022_jp" or len(report.notes) == 1


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("gb18030", "中文"),
        ("gb18030", "联通"),
        ("cp932", "日本語"),
        ("cp949", "한국"),
        ("cp850", "Die Prüfung öffnet täglich."),
        ("mac_roman", "Die Prüfung kostet viel, sagte Jürgen."),
        ("cp1252", "naïve approach"),
    ],
)
def test_what_could_be_another_encoding_is_refused(encoding: str, text: str) -> None:
    for repeat in (1, 20):
        with pytest.raises(RetrievalError, match=r"encoding uncertain .*; save it as UTF-8"):
            decode((text + " ").encode(encoding) * repeat, "f.txt")


def test_the_whole_file_decides() -> None:
    late = "A plain line of the log, nothing special.\n" * 3000 + "Überdruckventil öffnet\n"
    assert decode(late.encode("cp1252"), "f") == late
    chinese = "a" + "压力阀在八巴时打开。请每年进行维护。" * 3000
    assert decode(chinese.encode("gbk"), "f") == chinese


def test_stray_bytes_in_utf8_are_marked_and_told() -> None:
    report = LoadReport()
    good = "Der Prüfstand öffnet täglich. "
    text = decode(good.encode() + b"\xff" + good.encode(), "f", report=report)
    assert text == f"{good}\ufffd{good}"
    assert "not valid UTF-8 in 1 places" in report.notes[0].reason
    assert decode(b"\xef\xbb\xbfa\xff", "f") == "a\ufffd"


def test_lines_of_two_encodings_are_both_read() -> None:
    lines = [f"Zeile {i}: Prüfung geöffnet".encode() for i in range(9)]
    lines[4] = "Überprüfung täglich fällig".encode("cp1252")
    report = LoadReport()
    text = decode(b"\n".join(lines), "f", report=report)
    assert text.split("\n")[4] == "Überprüfung täglich fällig"
    assert text.split("\n")[5] == "Zeile 5: Prüfung geöffnet"
    assert "1 lines are not UTF-8; read as cp1252" in report.notes[0].reason


@pytest.mark.parametrize(
    ("head", "encoding"),
    [
        ('<meta charset="windows-1251">', "cp1251"),
        ('<meta http-equiv="Content-Type" content="text/html; charset=shift_jis">', "cp932"),
        ('<?xml version="1.0" encoding="ISO-8859-1"?>', "cp1252"),
        ("<meta charset=utf-8>", "utf-8"),
        ("<meta charset=utf-16>", "utf-8"),
        ("<meta charset=windows-1252>", "utf-8"),
    ],
)
def test_a_page_is_read_as_it_declares_and_utf8_wins(
    tmp_path: Path, head: str, encoding: str
) -> None:
    word = {"cp1251": "Да", "cp932": "日本"}.get(encoding, "Größe “x”")
    (tmp_path / "a.html").write_bytes(f"{head}<p>{word}".encode(encoding))
    assert next(iter(load_file(tmp_path / "a.html"))).text == word


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "cp1252"])
def test_json_lines_are_read_in_their_encoding(tmp_path: Path, encoding: str) -> None:
    texts = ["Die Prüfung öffnet täglich.", "Grüße aus Köln, schöne Straße.", "Das Maß."]
    lines = "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    (tmp_path / "a.jsonl").write_bytes(lines.encode(encoding))
    report = LoadReport()
    documents = list(load_file(tmp_path / "a.jsonl", report=report))
    assert [document.text for document in documents] == texts
    assert bool(report.notes) == (encoding == "cp1252")


def test_a_line_in_an_uncertain_encoding_does_not_stop_those_behind_it(tmp_path: Path) -> None:
    lines = [b'{"text": "one"}', '{"text": "中文"}'.encode("gb18030"), b'{"text": "three"}']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    report = LoadReport()
    documents = list(load_file(tmp_path / "a.jsonl", report=report))
    assert [document.text for document in documents] == ["one", "three"]
    assert [skip.path[-2:] for skip in report.skipped] == [":2"]
    assert "encoding uncertain" in report.skipped[0].reason
