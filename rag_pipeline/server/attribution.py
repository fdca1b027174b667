"""Which source a sentence of the answer leans on, judged by shared words after the answer is there.

Chunks carry no number in the prompt (a number would tie their KV to one place), so the model cannot cite.
The link is therefore made afterwards and is lexical: it says that the words stand in that chunk, and
nothing about whether the sentence follows from it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

MIN_WORDS = 2
MIN_SHARE = 0.5
"""A sentence is linked when at least this share of its content words, and two of them, stand in a chunk."""

_SENTENCE = re.compile(r"\S.*?(?:[.!?]+(?=\s|$)|\n|$)", re.DOTALL)
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
    answer
        The generated text.
    sources
        Text of citation 1, 2, ...; a tie goes to the first.

    Returns
    -------
    list of Attribution
        In the order of the answer; sentences without a link are left out.
    """
    bags = [_content_words(text) for text in sources]
    found: list[Attribution] = []
    for match in _SENTENCE.finditer(answer):
        words = _content_words(match.group())
        if not words or not bags:
            continue
        shared = [len(words & bag) for bag in bags]
        best = max(range(len(bags)), key=lambda i: (shared[i], -i))
        if shared[best] >= MIN_WORDS and shared[best] >= MIN_SHARE * len(words):
            start, end = match.start(), match.start() + len(match.group().rstrip())
            if found and found[-1].number == best + 1 and not answer[found[-1].end : start].strip():
                start = found.pop().start  # one link for neighbours that lean on the same chunk
            found.append(Attribution(start, end, best + 1))
    return found


def _content_words(text: str) -> set[str]:
    return {word for word in _WORD.findall(text.lower()) if word not in _COMMON}
