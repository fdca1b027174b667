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

# Longest first: the mark of UTF-32-LE begins with that of UTF-16-LE.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_SNIFF_BYTES = 65536
GUESS_BYTES = 1 << 18
"""What a guess looks at; the detector reads 3 MB of accented text per second."""
_TEXT_CONTROLS = {7, 8, 9, 10, 12, 13, 27}
_MAX_CONTROL_SHARE = 0.02
_SAVE = "save it as UTF-8"

# What files declare or the detector names, as browsers take it: Python's codec of the larger set.
_AS_BROWSERS = {
    "ascii": "cp1252", "iso8859-1": "cp1252", "iso8859-9": "cp1254", "iso8859-11": "cp874",
    "tis-620": "cp874", "gb2312": "gb18030", "gbk": "gb18030", "shift_jis": "cp932",
    "euc_kr": "cp949", "big5": "big5hkscs", "koi8-r": "koi8-u",
}  # fmt: skip
_LABELS = {"windows-874": "cp874", "iso-8859-8-i": "iso8859-8", "x-mac-cyrillic": "mac_cyrillic"}
_EAST_ASIAN = ("gb18030", "big5hkscs", "cp932", "euc_jp", "cp949")
_LATIN = {"cp1250", "cp1252", "cp1254", "cp1257", "cp1258", *(f"iso8859-{n}" for n in (
    2, 3, 4, 10, 13, 14, 15, 16))}  # fmt: skip
_ENGLISH = re.compile(r"\b(?:the|and|of|is|to|in|for|with|that|are|on)\b", re.I)

_INVALID = re.compile("[\udc80-\udcff]+")
_WIDE = re.compile("[^\x00-\x7f\udc80-\udcff]")
# No text in the right encoding has these in numbers: a sign inside a word, a capital behind a
# small letter, a letter that touches a digit, a control or private character.
_ODD = re.compile(
    r"(?<=[^\W\d_])[^\w\s\x00-\x7f\xad\xb7\u2010-\u2015\u2018-\u201d\u2026\u200b-\u200d\u00b0\u00ae\u2122\u00ab\u00bb]+(?=[^\W\d_])"
    r"|(?<=[a-z\xdf-\xf6\xf8-\xff])[\x8a\x8c\x8e\xc0-\xd6\xd8-\xde\u0141\u0152\u0160\u0178\u017d](?=[a-z]|\b)"
    r"|[\xc0-\xd6\xd8-\xf6\xf8-\u024f](?=\d)|(?<=\d)[\xc0-\xd6\xd8-\xf6\xf8-\u024f]"
    r"|[\x80-\x9f\ue000-\uf8ff]"
)
_MAX_ODD_SHARE = 0.1
_THAI = re.compile("[\u0e01-\u0e5b]")
# A vowel or tone without its consonant.
_THAI_TORN = re.compile(
    "(?<![\u0e01-\u0e2e\u0e31\u0e34-\u0e3a\u0e47-\u0e4e])[\u0e30-\u0e3a\u0e47-\u0e4e]"
    "|[\u0e40-\u0e44](?![\u0e01-\u0e2e])"
)
_THAI_GLUED = re.compile("[\u0e01-\u0e5b][A-Za-z]|[A-Za-z][\u0e01-\u0e5b]")
# Guesses that the letters alone bear out.
_KNOWN_BY_SCRIPT = {"cp932", "euc_jp", "cp949"}


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
        text = _decoded(payload, encoding)
        if text is None:
            raise RetrievalError(f"{name}: not valid {encoding}; {_SAVE}")
        return text
    is_utf8 = payload.startswith(codecs.BOM_UTF8)
    payload = payload.removeprefix(codecs.BOM_UTF8)
    if b"\0" in payload[:_SNIFF_BYTES] and (wide := _without_mark(payload)):
        text, encoding = wide
        _tell(report, name, f"read as {encoding}, which it does not say; check a few lines")
        return text
    head = payload[:_SNIFF_BYTES]
    controls = sum(byte < 32 and byte not in _TEXT_CONTROLS for byte in head)
    if b"\0" in head or controls > _MAX_CONTROL_SHARE * len(head):
        raise RetrievalError(f"{name}: binary file; only text and the known formats can be read")
    declared = _declared(payload) if is_html else None
    if b"\x1b$" in payload and (text := _decoded(payload, "iso2022_jp_2")) is not None:
        return text
    if (text := _decoded(payload, "utf-8")) is not None:
        return text
    if declared not in (None, "utf-8") and (text := _decoded(payload, str(declared))) is not None:
        return text
    if (text := nearly_utf8(payload, name, report, certain=is_utf8)) is not None:
        return text
    encoding = guess_encoding(payload, name)
    text = payload.decode(encoding)
    _tell(report, name, f"read as {encoding}, a guess; check a few lines or {_SAVE}")
    return text


def _tell(report: LoadReport | None, name: str, words: str) -> None:
    if report is not None:
        report.note(name, words)


def marked_encoding(head: bytes) -> str | None:
    """Encoding of a UTF-16 or UTF-32 byte-order mark."""
    return next((encoding for mark, encoding in _MARKS if head.startswith(mark)), None)


def _decoded(payload: bytes, encoding: str) -> str | None:
    try:
        return payload.decode(encoding)
    except (UnicodeDecodeError, LookupError):
        return None


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
        text = _decoded(payload, encoding)
        if text is not None and _is_written(text[:_SNIFF_BYTES]):
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
        payload[:_SNIFF_BYTES], is_html=True, search_entire_document=False
    )
    return None if label is None else _codec(label)


def _codec(label: str) -> str | None:
    label = label.lower().strip()
    try:
        found = codecs.lookup(_LABELS.get(label, label)).name
    except LookupError:
        return None
    # The page was read as ASCII up to here; two-byte encodings cannot be meant.
    return "utf-8" if found.startswith(("utf-16", "utf-32")) else _AS_BROWSERS.get(found, found)


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
    wide = [_WIDE.search(line) is not None for line in lines]
    bad = [_INVALID.search(line) is not None for line in lines]
    num_clean = sum(w and not b for w, b in zip(wide, bad, strict=True))
    num_torn = sum(w and b for w, b in zip(wide, bad, strict=True))
    num_bad_bytes = sum(map(len, _INVALID.findall(text)))
    # Text in another encoding has valid sequences by chance only.
    is_mixed = num_clean >= max(3, 5 * num_torn)
    if not (certain or is_mixed or len(_WIDE.findall(text)) >= 5 * num_bad_bytes):
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


def guess_encoding(payload: bytes, name: str) -> str:
    """Find the encoding of text that is neither marked nor UTF-8.

    Raises
    ------
    RetrievalError
        When no encoding is certain.
    """
    from chardetng_py import EncodingDetector

    lines = [line for line in payload.splitlines(keepends=True) if not line.isascii()]
    sample = b"".join(lines)
    detector = EncodingDetector()
    detector.feed(sample[:GUESS_BYTES], last=len(sample) <= GUESS_BYTES)
    encoding = _codec(detector.guess(tld=None, allow_utf8=False)) or "cp1252"
    likely = [encoding]
    if encoding in _LATIN and encoding != "cp1252":
        likely = _western_instead(sample, encoding)
    candidates = likely if len(likely) == 1 else []
    # The browsers' detector knows Thai by the address of a page only, and takes it for Chinese.
    if encoding not in _KNOWN_BY_SCRIPT:
        candidates = ["cp874", *candidates]
    for found in candidates:
        text = _decoded(sample, found)
        if (
            text is not None
            and _is_plausible(text, sample, found)
            and _decoded(payload, found) is not None
        ):
            return found
    if encoding in _EAST_ASIAN:
        likely += [other for other in _EAST_ASIAN if _decoded(sample, other) is not None]
    names = " or ".join(dict.fromkeys(likely))
    raise RetrievalError(f"{name}: text encoding uncertain (perhaps {names}); {_SAVE}")


def _western_instead(sample: bytes, encoding: str) -> list[str]:
    """What to take where a rare Latin encoding is only a letter away from the common one."""
    text, western = _decoded(sample, encoding), _decoded(sample, "cp1252")
    if text is None or western is None or _ODD.search(western):
        return [encoding]
    words = set(zip(text.split(), western.split(), strict=False))
    num_differing = sum(a != b for word, other in words for a, b in zip(word, other, strict=False))
    is_odd = _ODD.search(text) is not None
    if num_differing >= 2 and not is_odd:
        return [encoding]
    if is_odd or len(set(_ENGLISH.findall(text.lower()))) >= 2:
        return ["cp1252"]
    return [encoding, "cp1252"]


def _is_plausible(text: str, sample: bytes, encoding: str) -> bool:
    """Whether lines that are not ASCII read as text in this encoding."""
    text = text[:_SNIFF_BYTES]
    wide = "".join(_WIDE.findall(text))
    if encoding in _EAST_ASIAN:
        # A word or two is valid in all of them.
        alone = len(set(wide)) >= 8 or not any(
            _decoded(sample, other) is not None for other in _EAST_ASIAN if other != encoding
        )
        return alone and _is_common(text, encoding)
    num_narrow = sum(sign.isascii() and sign.isalpha() for sign in text)
    if encoding == "cp874":
        num_thai = len(_THAI.findall(text))
        torn = len(_THAI_TORN.findall(text))
        glued = len(_THAI_GLUED.findall(text))
        return (
            num_thai >= max(16, num_narrow, 0.95 * len(wide))
            and torn <= 0.005 * num_thai
            and glued <= 0.1 * num_thai
        )
    if encoding in _LATIN and 4 * num_narrow < sum(sign.isalpha() for sign in wide):
        return False
    return len(_ODD.findall(text)) <= _MAX_ODD_SHARE * len(wide)


def _is_common(text: str, encoding: str) -> bool:
    """Whether most signs are everyday ones: a wrong reading gives rare ones."""
    signs = [sign for sign in text if "\u3400" <= sign <= "\u9fff" or "\uac00" <= sign <= "\ud7a3"]
    kana = sum("\u3040" <= sign <= "\u30ff" for sign in text)
    if not signs:
        return kana > 0
    narrow = {"gb18030": "gb2312", "big5hkscs": "big5", "cp932": "shift_jis", "cp949": "euc_kr"}
    common = 0
    for sign in signs:
        try:
            code = sign.encode(narrow.get(encoding, encoding))
        except UnicodeEncodeError:
            continue
        # The first half of each set holds what is written daily.
        limit = {"gb18030": 0xD8, "big5hkscs": 0xC7, "cp932": 0x98, "euc_jp": 0xD0}
        common += code[0] < limit.get(encoding, 0xC9)
    return common >= 0.7 * len(signs)
