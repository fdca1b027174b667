"""From bytes to text: by mark, by declaration, as UTF-8, or by a guess that must prove itself.

A wrong guess is worse than none: it is stored, searched and answered from. So a guess is taken
only where the words it gives look like words, it is named in the report, and where two encodings
are as likely the file is refused.
"""

from __future__ import annotations

import codecs
import re
import unicodedata

from retrievers.errors import RetrievalError
from retrievers.loaders.base import LoadReport
from retrievers.loaders.encoding_guess import (
    SAVE,
    SNIFF_BYTES,
    WIDE,
    decoded_or_none,
    guess_encoding,
    python_codec,
)

# Longest first: the mark of UTF-32-LE begins with that of UTF-16-LE.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_TEXT_CONTROLS = {7, 8, 9, 10, 12, 13, 27}
_MAX_CONTROL_SHARE = 0.02

_INVALID = re.compile("[\udc80-\udcff]+")


def decode(
    payload: bytes, name: str, *, report: LoadReport | None = None, is_html: bool = False
) -> str:
    """Decode the bytes of a text file.

    Parameters
    ----------
    payload : bytes
        The whole file.
    name : str
        What messages call it.
    report : LoadReport, optional
        Told when an encoding was guessed or bytes could not be read.
    is_html : bool
        Whether a page may declare its encoding.

    Returns
    -------
    str

    Raises
    ------
    RetrievalError
        When the bytes are binary, or no encoding is certain.
    """
    if (encoding := marked_encoding(payload)) is not None:
        text = decoded_or_none(payload, encoding)
        if text is None:
            raise RetrievalError(f"{name}: not valid {encoding}; {SAVE}")
        return text
    is_utf8 = payload.startswith(codecs.BOM_UTF8)
    payload = payload.removeprefix(codecs.BOM_UTF8)
    if b"\0" in payload[:SNIFF_BYTES] and (wide := _without_mark(payload)):
        text, encoding = wide
        _tell(report, name, f"read as {encoding}, which it does not say; check a few lines")
        return text
    head = payload[:SNIFF_BYTES]
    controls = sum(byte < 32 and byte not in _TEXT_CONTROLS for byte in head)
    if b"\0" in head or controls > _MAX_CONTROL_SHARE * len(head):
        raise RetrievalError(f"{name}: binary file; only text and the known formats can be read")
    declared = _declared(payload) if is_html else None
    if b"\x1b$" in payload and (text := decoded_or_none(payload, "iso2022_jp_2")) is not None:
        return text
    if (text := decoded_or_none(payload, "utf-8")) is not None:
        return text
    if (
        declared not in (None, "utf-8")
        and (text := decoded_or_none(payload, str(declared))) is not None
    ):
        return text
    if (text := nearly_utf8(payload, name, report, certain=is_utf8)) is not None:
        return text
    encoding = guess_encoding(payload, name)
    text = payload.decode(encoding)
    _tell(report, name, f"read as {encoding}, a guess; check a few lines or {SAVE}")
    return text


def _tell(report: LoadReport | None, name: str, words: str) -> None:
    if report is not None:
        report.note(name, words)


def marked_encoding(head: bytes) -> str | None:
    """Encoding of a UTF-16 or UTF-32 byte-order mark."""
    return next((encoding for mark, encoding in _MARKS if head.startswith(mark)), None)


def _without_mark(payload: bytes) -> tuple[str, str] | None:
    """UTF-16 or UTF-32 without a mark: every line end and blank has its NUL on one side."""
    for encoding, width, blanks in (
        ("utf-32-le", 4, (b"\n\0\0\0", b" \0\0\0")),
        ("utf-32-be", 4, (b"\0\0\0\n", b"\0\0\0 ")),
        ("utf-16-le", 2, (b"\n\0", b" \0")),
        ("utf-16-be", 2, (b"\0\n", b"\0 ")),
    ):
        if len(payload) % width or not any(
            payload.find(blank) % width == 0 for blank in blanks if blank in payload
        ):
            continue
        text = decoded_or_none(payload, encoding)
        if text is not None and _is_written(text[:SNIFF_BYTES]):
            return text, encoding
    return None


def _is_written(text: str) -> bool:
    """Whether nearly all of `text` are letters, digits, marks and signs in few scripts."""
    bad = sum(
        unicodedata.category(sign) in ("Cc", "Cn", "Co", "Cs") and sign not in "\n\r\t\f"
        for sign in text
    )
    blocks = {ord(sign) >> 8 for sign in text if not "\u3400" <= sign <= "\ud7ff"}
    return bad <= len(text) * 0.005 and len(blocks) <= 12


def _declared(payload: bytes) -> str | None:
    """Encoding that the head of a page names, as a browser understands it."""
    from bs4.dammit import EncodingDetector

    label = EncodingDetector.find_declared_encoding(
        payload[:SNIFF_BYTES], is_html=True, search_entire_document=False
    )
    return None if label is None else python_codec(label)


def nearly_utf8(
    payload: bytes, name: str, report: LoadReport | None, *, certain: bool = False
) -> str | None:
    """Read UTF-8 with a few bytes that are not, or with lines of another encoding between.

    Returns
    -------
    str or None
        ``None`` where `payload` is in another encoding, unless it is `certain` to be UTF-8.
    """
    text = payload.decode("utf-8", "surrogateescape")
    lines = text.split("\n")
    wide = [WIDE.search(line) is not None for line in lines]
    bad = [_INVALID.search(line) is not None for line in lines]
    num_clean = sum(w and not b for w, b in zip(wide, bad, strict=True))
    num_torn = sum(w and b for w, b in zip(wide, bad, strict=True))
    num_bad_bytes = sum(map(len, _INVALID.findall(text)))
    # Text in another encoding has valid sequences by chance only.
    is_mixed = num_clean >= max(3, 5 * num_torn)
    if not (certain or is_mixed or len(WIDE.findall(text)) >= 5 * num_bad_bytes):
        return None
    foreign = [i for i in range(len(lines)) if bad[i] and not wide[i]]
    if foreign and not certain:
        raw = "\n".join(lines[i] for i in foreign).encode("utf-8", "surrogateescape")
        try:
            encoding = guess_encoding(raw, name)
        except RetrievalError:
            pass
        else:
            for i, line in zip(foreign, raw.decode(encoding).split("\n"), strict=True):
                lines[i] = line
            _tell(report, name, f"{len(foreign)} lines are not UTF-8; read as {encoding}, a guess")
            text = "\n".join(lines)
    text, num_replaced = _INVALID.subn("\ufffd", text)
    if num_replaced:
        _tell(report, name, f"not valid UTF-8 in {num_replaced} places, which are lost")
    return text
