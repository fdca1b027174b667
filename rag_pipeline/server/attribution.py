"""Which source a sentence of the answer leans on, judged by shared words after the answer is there.

Chunks carry no number in the prompt (a number would tie their KV to one place), so the model cannot cite.
The link is therefore made afterwards and is lexical: it says that the words stand in that chunk, and
nothing about whether the sentence follows from it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

MIN_WORDS = 2
MIN_SHARE = 0.5
"""A sentence is linked when at least this share of its content words, and two of them, stand in a chunk."""

_STOPS = frozenset(".!?")
_WORD = re.compile(r"\w+")
_COMMON_TEXT = """
a an and are as at be been but by can do does for from had has have he her his i if in into is it its may not of
on or our she so such than that the their them then there these they this to was we were what when where which
who will with would you your
"""
_COMMON = frozenset(_COMMON_TEXT.split())


class Attribution(NamedTuple):
    """Characters ``[start, end)`` of the answer, and the number of the citation they lean on."""

    start: int
    end: int
    number: int


def attribute(answer: str, sources: Sequence[str]) -> list[Attribution]:
    """Link sentences to sources.

    Parameters
    ----------
    answer : str
        The generated text.
    sources : sequence of str
        Text of citation 1, 2, ...; a tie goes to the first.

    Returns
    -------
    list of Attribution
        In the order of the answer; sentences without a link are left out.
    """
    bags = [_content_words(text) for text in sources]
    found: list[Attribution] = []
    for start, end in _sentences(answer):
        words = _content_words(answer[start:end])
        if not words or not bags:
            continue
        shared = [len(words & bag) for bag in bags]
        best = max(range(len(bags)), key=lambda i: (shared[i], -i))
        if shared[best] >= MIN_WORDS and shared[best] >= MIN_SHARE * len(words):
            if found and found[-1].number == best + 1 and not answer[found[-1].end : start].strip():
                start = found.pop().start  # one link for neighbours that lean on the same chunk
            found.append(Attribution(start, end, best + 1))
    return found


def _sentences(text: str) -> Iterator[tuple[int, int]]:
    """Yield where sentences stand, without the white space around them; every letter is looked at once.

    A sentence ends behind stops that white space follows, and with its line.
    """
    last = ""
    start = end = 0  # `end` is behind the last letter that is no white space
    for place, letter in enumerate(text):
        if not letter.isspace():
            if start == end:
                start = place
            end = place + 1
            last = letter
        elif start < end and (letter == "\n" or (end == place and last in _STOPS)):
            yield start, end
            start = end
    if start < end:
        yield start, end


def _content_words(text: str) -> set[str]:
    return {word for word in _WORD.findall(text.lower()) if word not in _COMMON}
