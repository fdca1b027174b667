"""Cut a text into atoms: the sentences, list items, headings and code lines a chunk is made of.

Every decision looks at one paragraph (a run of non-blank lines) and at whether its neighbour is a
heading, never further, so an edit elsewhere in the document cannot move an atom's borders.
"""

from __future__ import annotations

import re
import zlib
from bisect import bisect_left
from collections.abc import Iterator
from enum import IntEnum
from functools import lru_cache
from typing import Any, NamedTuple


class Boundary(IntEnum):
    """How good a place to break the start of an atom is; lower is better."""

    SECTION = 0  # before a heading
    PARAGRAPH = 1
    SENTENCE = 2  # also a list item, a line of code or a table row
    WORD = 3  # inside a sentence, or between a heading and what it heads


class Atom(NamedTuple):
    """A piece of text that is not divided further unless it alone exceeds a chunk."""

    start: int
    end: int
    boundary: Boundary


class _Line(NamedTuple):
    start: int  # of the line itself, indentation included
    text: str


_MAX_HEADING_CHARS = 90
_HASH_HEADING = re.compile(r"#{1,6}\s+\S")
_UNDERLINE = re.compile(r"([=\-~*^#+\"'`._:])\1{2,}\s*$")
_ITEM = re.compile(r"\s*(?:[-*+\u2022\u2023\u2013]|\(?(?:\d{1,3}|[A-Za-z])[.)])\s+\S")
_FENCE = re.compile(r"\s*(?:```|~~~|>>> |\.\.\. )")
_CODE_SYMBOL = re.compile(r"[=(){}\[\];<>|\\@$&^~_`]|::|->")
# Where a script writes sentences without a space behind the full stop.
_WIDE_STOP = re.compile(r"[\u3002\uff01\uff1f\uff61]+[\u300d\u300f\u201d\u2019\uff09]*")
_CODE_SYMBOLS_PER_CHAR = 0.06
_MIN_INDENT = 2
_WORD = re.compile(r"\S+")
# The sentence model looks from every full stop to the end of its word: without a bound on words, the
# steps would grow with the square of a text that has no blanks. Below the bound nothing changes.
_MAX_WORD_CHARS = 2048
_LONG_WORD = re.compile(rf"(?<!\S)\S{{{_MAX_WORD_CHARS + 1},}}")
_CLAUSE_MARKS = ",;:)]}"
_MAX_GROUP_WORDS = 24


def find_atoms(text: str) -> list[Atom]:
    """Cut `text` into atoms, in order, that together hold every non-blank character.

    Parameters
    ----------
    text : str
        Any text; paragraphs are parted by blank lines.

    Returns
    -------
    list of Atom
        Disjoint and ascending; only whitespace lies between them. Empty for blank text.
    """
    atoms: list[Atom] = []
    after_heading = False
    for block in _paragraphs(text):
        heading = _is_heading(block)
        if after_heading:
            first = Boundary.WORD
        else:
            first = Boundary.SECTION if heading else Boundary.PARAGRAPH
        after_heading = heading
        if heading:
            spans = [(block[0].start, block[-1].start + len(block[-1].text))]
        else:
            spans = list(_spans(text, block))
        for start, end in spans:
            atoms.append(Atom(start, end, first))
            first = Boundary.SENTENCE
    return atoms


def _paragraphs(text: str) -> Iterator[list[_Line]]:
    block: list[_Line] = []
    start = 0
    for line in text.split("\n"):
        stripped = line.rstrip()
        if stripped:
            # "# Title" directly above its text, as Markdown allows, is a paragraph of its own.
            if _HASH_HEADING.match(stripped):
                if block:
                    yield block
                yield [_Line(start, stripped)]
                block = []
            else:
                block.append(_Line(start, stripped))
        elif block:
            yield block
            block = []
        start += len(line) + 1
    if block:
        yield block


def _is_heading(block: list[_Line]) -> bool:
    first = block[0].text
    if len(block) == 2:
        return bool(_UNDERLINE.match(block[1].text)) and len(first) <= _MAX_HEADING_CHARS
    if len(block) > 2:
        return False
    if _HASH_HEADING.match(first):
        return True
    return (
        len(first) <= _MAX_HEADING_CHARS
        and not first[0].isspace()
        and first[-1] not in ".!?:;,|)]}>\"'\u3002\uff01\uff1f"
        and any(map(str.isalpha, first))
        and not _ITEM.match(first)
        and not _is_code(block)
    )


def _is_code(block: list[_Line]) -> bool:
    """Tell code, grammar and tables, whose lines are units, from wrapped prose."""
    if any(_FENCE.match(line.text) for line in block):
        return True
    if len(block) > 1 and all("|" in line.text for line in block):
        return True
    body = " ".join(line.text.lstrip() for line in block)
    density = len(_CODE_SYMBOL.findall(body)) / len(body)
    if all(line.text[:_MIN_INDENT].isspace() for line in block):
        return density > _CODE_SYMBOLS_PER_CHAR / 2
    return density > _CODE_SYMBOLS_PER_CHAR and len(block) > 1


def _spans(text: str, block: list[_Line]) -> Iterator[tuple[int, int]]:
    if _is_code(block):
        for line in block:
            yield line.start, line.start + len(line.text)
        return
    # A list item opens a run of its own; wrapped lines behind it belong to it.
    run_start = block[0].start
    for line in block[1:]:
        if _ITEM.match(line.text):
            yield from _sentences(text, run_start, line.start)
            run_start = line.start
    yield from _sentences(text, run_start, block[-1].start + len(block[-1].text))


def _sentences(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    run = text[start:end]
    for span_start, span_end in _model_spans(run):
        cuts = [match.end() for match in _WIDE_STOP.finditer(run, span_start, span_end)]
        for cut in [*cuts, span_end]:
            piece = run[span_start:cut]
            stripped = piece.strip()
            if stripped:
                left = span_start + len(piece) - len(piece.lstrip())
                yield start + left, start + left + len(stripped)
            span_start = cut


def _model_spans(run: str) -> list[tuple[int, int]]:
    """Sentences by the model, which is shown only the two ends of an overlong word."""
    shown: list[str] = []
    seams, left_out = [], [0]
    begin = position = 0
    for word in _LONG_WORD.finditer(run):
        head, tail = word.start() + _MAX_WORD_CHARS // 2, word.end() - _MAX_WORD_CHARS // 2
        shown.append(run[begin:head])
        position += head - begin
        seams.append(position)
        left_out.append(left_out[-1] + tail - head)
        begin = tail
    shown.append(run[begin:])
    spans: list[tuple[int, int]] = _tokenizer()("".join(shown))
    if not seams:
        return spans
    return [
        (a + left_out[bisect_left(seams, a)], b + left_out[bisect_left(seams, b)]) for a, b in spans
    ]


@lru_cache(maxsize=1)
def _tokenizer() -> Any:
    # Imported on first use: loading the sentence model takes tens of milliseconds.
    from nupunkt import sent_spans

    return sent_spans


def divide_sentence(text: str, atom: Atom) -> list[Atom]:
    """Cut an atom too long for a chunk into groups of words, at places its words decide.

    A group ends behind a clause mark, or behind a word whose checksum says so (about one in
    eight), and after 24 words at the latest: an edit inside the sentence moves the next few
    groups only.

    Returns
    -------
    list of Atom
        Covers the same non-blank characters; the first keeps the boundary of `atom`.
    """
    groups: list[tuple[int, int]] = []
    group_start = -1
    group_end = words = 0
    for start, end in _words(text, atom):
        if group_start < 0:
            group_start = start
        group_end = end
        words += 1
        word = text[start:end]
        if word[-1] in _CLAUSE_MARKS or _checksum(word) % 8 == 0 or words >= _MAX_GROUP_WORDS:
            groups.append((group_start, group_end))
            group_start, words = -1, 0
    if group_start >= 0:
        groups.append((group_start, group_end))
    return _parts(atom, groups)


def divide_words(text: str, atom: Atom) -> list[Atom]:
    """Cut an atom at every blank; what :func:`divide_sentence` returns, word by word."""
    return _parts(atom, list(_words(text, atom)))


def _words(text: str, atom: Atom) -> Iterator[tuple[int, int]]:
    return (match.span() for match in _WORD.finditer(text, atom.start, atom.end))


def _parts(atom: Atom, spans: list[tuple[int, int]]) -> list[Atom]:
    parts = [Atom(start, end, Boundary.WORD) for start, end in spans]
    # The first keeps its rank and, in a line of code, the indentation.
    parts[0] = Atom(atom.start, parts[0].end, atom.boundary)
    return parts


def _checksum(word: str) -> int:
    """Checksum that is the same in every process, unlike ``hash``."""
    return zlib.crc32(word.encode("utf-8", "surrogatepass"))
