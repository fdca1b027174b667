"""Documents to compare attention methods with, and several questions about each: key-value pairs, and passkeys in prose."""

from __future__ import annotations

import dataclasses
import random
import uuid
from collections.abc import Callable
from itertools import pairwise

from rag_eval.datasets.core import Encode
from rag_eval.datasets.filler import filler_chunks
from rag_eval.datasets.words import ADJECTIVES, NOUNS
from rag_eval.errors import EvalError

UNIT = 128
"""Documents end at multiples: a piece behind one chooses the blocks that it would choose in the whole prompt."""

KINDS = ("key_value", "passkey")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """One question about a document.

    Attributes
    ----------
    ids : tuple of int
        What stands behind the document.
    answer : tuple of int
        What a model says next that found it; chance is at most one in 10 ** 7.
    depth : float
        Where in the document it stands, 0 to 1.
    """

    ids: tuple[int, ...]
    answer: tuple[int, ...]
    depth: float


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """A long text and questions whose answers lie at depths spread over it.

    Attributes
    ----------
    kind : str
        One of :data:`KINDS`.
    ids : tuple of int
        A multiple of :data:`UNIT` tokens.
    questions : tuple of Question
        Each alone behind the document.
    """

    kind: str
    ids: tuple[int, ...]
    questions: tuple[Question, ...]


def make_document(kind: str, tokens: int, questions: int, encode: Encode, seed: str) -> Document:
    """Make a document.

    Parameters
    ----------
    kind : str
        ``key_value``: one JSON object of random UUIDs and seven-digit numbers. ``passkey``: prose in which as many
        passkeys stand as there are questions.
    tokens : int
        Longest prompt, question and answer included.
    questions : int
        Questions.
    encode : Encode
        Of the model.
    seed : str
        Equal seeds give equal documents.

    Raises
    ------
    EvalError
        Too few tokens for so many questions.
    """
    make = {"key_value": _key_value, "passkey": _passkey}[kind]
    rng = random.Random(f"{kind}/{seed}")
    parts, places, question = make(tokens - _ROOM, questions, encode, rng)
    if len(places) < questions:
        raise EvalError(
            f"{tokens} tokens hold {len(places)} answers, {questions} are asked for; ask for fewer, or longer prompts"
        )
    starts: list[int] = []
    ids: list[int] = []
    for part in parts:
        starts.append(len(ids))
        ids += part
    end = len(ids) // UNIT * UNIT
    made = []
    for place, key, value in places:
        text, answer = question(key, value)
        made.append(
            Question(
                ids=(*ids[end:], *encode(text)),
                answer=tuple(encode(answer)),
                depth=round(starts[place] / len(ids), 3),
            )
        )
    return Document(kind=kind, ids=tuple(ids[:end]), questions=tuple(made))


_ROOM = 112
"""Tokens of the longest question and answer."""

_Parts = tuple[list[list[int]], list[tuple[int, str, str]], Callable[[str, str], tuple[str, str]]]
"""Pieces of a document; index of the piece, key and value of each question; its words."""


def _number(rng: random.Random) -> str:
    return str(rng.randrange(1_000_000, 10_000_000))


def _keys(rng: random.Random) -> list[str]:
    """Every pair of words, shuffled."""
    keys = [f"{adjective} {noun}" for adjective in ADJECTIVES for noun in NOUNS]
    rng.shuffle(keys)
    return keys


def _spread(count: int, within: int, rng: random.Random) -> list[int]:
    """So many of ``0 .. within - 1``, one from each of as many equal parts; fewer where there are not enough."""
    count = min(count, within)
    borders = [within * at // count for at in range(count + 1)] if count else []
    return [rng.randrange(lo, hi) for lo, hi in pairwise(borders)]


def _key_value(room: int, count: int, encode: Encode, rng: random.Random) -> _Parts:
    parts = [list(encode("Extract the value of a key from the JSON object below.\n\n{"))]
    size = len(parts[0])
    pairs = []
    while True:
        key, value = str(uuid.UUID(int=rng.getrandbits(128), version=4)), _number(rng)
        pair = list(encode(f'"{key}": "{value}", '))
        if size + len(pair) > room:
            break
        parts.append(pair)
        pairs.append((key, value))
        size += len(pair)
    places = [(at + 1, *pairs[at]) for at in _spread(count, len(pairs), rng)]
    parts.append(list(encode("}")))

    def question(key: str, value: str) -> tuple[str, str]:
        return f'\n\nThe value of the key "{key}":\n"{key}": "', value

    return parts, places, question


def _passkey(room: int, count: int, encode: Encode, rng: random.Random) -> _Parts:
    keys = _keys(rng)[:count]
    facts = [(key, _number(rng)) for key in keys]
    lines = [f" The pass key of the {key} is {value}." for key, value in facts]
    size = sum(len(encode(line)) for line in lines)
    sentences = filler_chunks(1, max(1, room - size), encode, rng)[0]
    parts: list[list[int]] = []
    for sentence in sentences:
        part = list(encode((" " if parts else "") + sentence))
        if size + len(part) > room:
            break
        parts.append(part)
        size += len(part)
    places = []
    for put, at in enumerate(_spread(count, len(parts), rng)):
        parts.insert(at + put + 1, list(encode(lines[put])))
        places.append((at + put + 1, *facts[put]))

    def question(key: str, value: str) -> tuple[str, str]:
        return f"\n\nThe pass key of the {key} is", f" {value}"

    return parts, places, question
