"""Real English text that every CPython installation carries: the language reference topics."""

from __future__ import annotations

import random
import re
from functools import cache

from rag_eval.datasets.core import Encode


@cache
def paragraphs() -> tuple[str, ...]:
    """Prose paragraphs of ``pydoc_data.topics``, each on one line, in a fixed order.

    Headings, tables, grammar and code are left out: they are short, or their lines are indented
    under a directive.
    """
    from pydoc_data.topics import topics

    found: list[str] = []
    for name in sorted(topics):
        for block in re.split(r"\n\s*\n", topics[name]):
            lines = block.split("\n")
            text = re.sub(r"\s+", " ", block).strip()
            prose = text[:1].isupper() and text.endswith(".") and "::=" not in text
            if prose and len(text) >= 120 and not lines[0].startswith("    "):
                found.append(text)
    return tuple(dict.fromkeys(found))


def reference_lines() -> list[str]:
    """Distinct lines of ``pydoc_data.topics`` that are longer than 40 characters, in a fixed order."""
    from pydoc_data.topics import topics

    lines = (line.strip() for name in sorted(topics) for line in topics[name].split("\n"))
    return list(dict.fromkeys(line for line in lines if len(line) > 40))


def sentences(text: str) -> list[str]:
    """Split at a full stop, question or exclamation mark followed by a capital letter."""
    return re.split(r"(?<=[.!?]) +(?=[A-Z\"])", text)


def filler_chunks(count: int, tokens: int, encode: Encode, rng: random.Random) -> list[list[str]]:
    """Draw `count` chunks of whole sentences, each of about `tokens` tokens and all distinct.

    Returns
    -------
    list of list of str
        The sentences of each chunk; their lengths add up to at least ``tokens - 40`` and at most
        `tokens`, unless a single sentence is longer.
    """
    source = list(paragraphs())
    rng.shuffle(source)
    chunks: list[list[str]] = []
    stream = (sentence for text in _endless(source) for sentence in sentences(text))
    for _ in range(count):
        chunk: list[str] = []
        size = 0
        for sentence in stream:
            length = len(encode(" " + sentence))
            if chunk and size + length > tokens:
                break
            chunk.append(sentence)
            size += length
        chunks.append(chunk)
    return chunks


def _endless(source: list[str]) -> list[str]:
    """Repeat the source often enough for the longest prompt; a repeat only follows the whole."""
    return source * 8
