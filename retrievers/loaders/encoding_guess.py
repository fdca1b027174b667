"""The guess of an encoding, and the proof it must give: the words that it makes look like words."""

from __future__ import annotations

import codecs
import re

from retrievers.errors import RetrievalError

SNIFF_BYTES = 65536
"""What is looked at to tell text from what is none."""
GUESS_BYTES = 1 << 18
"""What a guess looks at; the detector reads 3 MB of accented text per second."""
SAVE = "save it as UTF-8"
"""What a message advises."""

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

WIDE = re.compile("[^\x00-\x7f\udc80-\udcff]")
"""A character that is neither ASCII nor a byte that could not be read."""
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


def decoded_or_none(payload: bytes, encoding: str) -> str | None:
    """Text of `payload`; None where it is not valid in this encoding."""
    try:
        return payload.decode(encoding)
    except (UnicodeDecodeError, LookupError):
        return None


def python_codec(label: str) -> str | None:
    """Python's name of an encoding as browsers take its label; None where Python has none."""
    label = label.lower().strip()
    try:
        found = codecs.lookup(_LABELS.get(label, label)).name
    except LookupError:
        return None
    # The page was read as ASCII up to here; two-byte encodings cannot be meant.
    return "utf-8" if found.startswith(("utf-16", "utf-32")) else _AS_BROWSERS.get(found, found)


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
    encoding = python_codec(detector.guess(tld=None, allow_utf8=False)) or "cp1252"
    likely = [encoding]
    if encoding in _LATIN and encoding != "cp1252":
        likely = _western_instead(sample, encoding)
    candidates = likely if len(likely) == 1 else []
    # The browsers' detector knows Thai by the address of a page only, and takes it for Chinese.
    if encoding not in _KNOWN_BY_SCRIPT:
        candidates = ["cp874", *candidates]
    for found in candidates:
        text = decoded_or_none(sample, found)
        if (
            text is not None
            and _is_plausible(text, sample, found)
            and decoded_or_none(payload, found) is not None
        ):
            return found
    if encoding in _EAST_ASIAN:
        likely += [other for other in _EAST_ASIAN if decoded_or_none(sample, other) is not None]
    names = " or ".join(dict.fromkeys(likely))
    raise RetrievalError(f"{name}: text encoding uncertain (perhaps {names}); {SAVE}")


def _western_instead(sample: bytes, encoding: str) -> list[str]:
    """What to take where a rare Latin encoding is only a letter away from the common one."""
    text, western = decoded_or_none(sample, encoding), decoded_or_none(sample, "cp1252")
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
    text = text[:SNIFF_BYTES]
    wide = "".join(WIDE.findall(text))
    if encoding in _EAST_ASIAN:
        # A word or two is valid in all of them.
        alone = len(set(wide)) >= 8 or not any(
            decoded_or_none(sample, other) is not None for other in _EAST_ASIAN if other != encoding
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
