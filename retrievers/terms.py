"""Text to the terms that BM25 counts: one term for what a reader calls the same word.

Unicode writes one word in many ways: composed or decomposed, in full width, with vowel points,
accents, soft hyphens or joiners, in another case. All of them fold to one term, much as Lucene's
ICU folding does. In scripts without spaces, where words cannot be told apart without a dictionary,
each sign and each pair of neighbours is a term, so that a word finds every sentence that holds it.
"""

from __future__ import annotations

import re
import unicodedata
from itertools import pairwise

import regex

ANALYSIS = 2
"""Version of the rules; terms made by other rules are made anew."""

_ASCII_WORD = re.compile(r"\w+")
_INVISIBLE = regex.compile(r"[\p{Default_Ignorable_Code_Point}\p{Cf}]+")
# Would run into the word or number before once folded: 10½, Acme™, 10², a note's number.
_RUNNING_ON = regex.compile(
    r"[\u00bc-\u00be\u2150-\u215f\u2189\u2116\u2120\u2122\u2460-\u24ff\u2776-\u2793]"
    r"|(?:(?<=\p{L}{4})|(?<=\p{Nd}))[\u00b2\u00b3\u00b9\u2070-\u207b]"
)
# Read as an apostrophe, though Unicode calls them letters.
_APOSTROPHES = dict.fromkeys(
    map(ord, "\u02b9\u02ba\u02bb\u02bc\u02bd\u02be\u02bf\u02c8\u02ee"), " "
)
# Accents, points and the like; not the short i and u of Cyrillic, the voicing of kana and the
# vowels of Indic scripts, which are letters to a reader.
_ACCENT = regex.compile(
    r"(?<![\u0418\u0438\u0423\u0443])\u0306|\u093c|\u0640"
    r"|[[\p{Mn}\p{Me}]&&[\p{Inherited}\p{Latin}\p{Greek}\p{Cyrillic}\p{Arabic}\p{Hebrew}\p{Syriac}"
    r"\p{Samaritan}\p{Mandaic}\p{Coptic}]--[\u0306\u3099\u309a]]",
    regex.V1,
)
_UNSPACED = (
    r"\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}\p{Hangul}\p{Yi}\p{Nushu}\p{Tangut}"
    r"\p{Khitan_Small_Script}\p{Line_Break=Complex_Context}\u30fc"
)
_TERM = regex.compile(
    rf"(?P<unspaced>(?:[[{_UNSPACED}]&&[\p{{L}}\p{{M}}\p{{Nl}}]]\p{{M}}*)+)"
    rf"|(?:[[\p{{L}}\p{{N}}_]--[{_UNSPACED}]]\p{{M}}*)+",
    regex.V1,
)
_SIGN = regex.compile(r"\P{M}\p{M}*|\p{M}+")


def _base_letters() -> dict[int, str]:
    """Letters with a stroke or the like, which Unicode does not take apart; digits of every script."""
    letters = {0x131: "i", ord("æ"): "ae", ord("œ"): "oe", ord("ŀ"): "l"}
    # Persian and Urdu keyboards write other letters for what Arabic ones do; final forms.
    letters |= {0x6CC: "\u064a", 0x649: "\u064a", 0x6A9: "\u0643", 0x6C1: "\u0647", 0x629: "\u0647"}
    for code in range(0x80, 0x10000):
        sign = chr(code)
        if (digit := unicodedata.decimal(sign, None)) is not None:
            letters[code] = str(digit)
        elif found := re.fullmatch(
            r"LATIN SMALL LETTER ([A-Z]) WITH .*", unicodedata.name(sign, "")
        ):
            letters[code] = found[1].lower()
    return letters


_BASE_LETTERS = _base_letters()


def text_terms(text: str) -> list[str]:
    """Terms BM25 counts: folded words, without a stop list or stemming.

    No words are dropped because in technical text ``with``, ``not`` or ``C`` carry the meaning;
    BM25's own weighting makes the common ones nearly free.
    """
    if text.isascii():
        return _ASCII_WORD.findall(text.lower())
    found: list[str] = []
    for match in _TERM.finditer(fold(text)):
        if match["unspaced"] is None:
            found.append(match[0])
            continue
        signs = _SIGN.findall(match[0])
        found += signs
        found += (first + second for first, second in pairwise(signs))
    return found


def fold(text: str) -> str:
    """Bring every spelling of a word to one: width, composition, case, accents, points."""
    text = _RUNNING_ON.sub(r" \g<0> ", _INVISIBLE.sub("", text))
    text = unicodedata.normalize("NFKD", text.translate(_APOSTROPHES))
    text = _ACCENT.sub("", text).casefold().translate(_BASE_LETTERS)
    return unicodedata.normalize("NFC", text)
