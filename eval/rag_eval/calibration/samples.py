"""Prompts to calibrate with: look up one of many random keys in a JSON object, or a file of the user's."""

from __future__ import annotations

import json
import random
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

from rag_eval.datasets.filler import paragraphs
from rag_eval.errors import EvalError

_TEXT_FIELDS = ("text", "prompt", "input")

Encode = Callable[[str], Sequence[int]]
"""Token ids of a text."""


def retrieval_prompts(count: int, tokens: int, encode: Encode, seed: int = 0) -> list[list[int]]:
    """Make prompts as the paper calibrates with: a JSON object of random UUIDs, and one key to look up.

    Parameters
    ----------
    count : int
        Prompts.
    tokens : int
        Length of each, exactly; the object is as long as fits.
    encode : Encode
        Of the model.
    seed : int
        Equal seeds give equal prompts.
    """
    rng = random.Random(seed)
    return [_prompt(tokens, encode, rng) for _ in range(count)]


def _prompt(tokens: int, encode: Encode, rng: random.Random) -> list[int]:
    head = list(encode("Extract the value of the key in the JSON object below.\n\nJSON data:\n{"))
    keys: list[str] = []
    body: list[int] = []
    tail: list[int] = []
    while True:
        key, value = (str(uuid.UUID(int=rng.getrandbits(128), version=4)) for _ in range(2))
        pair = list(encode(f'"{key}": "{value}", '))
        keys.append(key)
        asked = keys[len(keys) // 3]
        tail = list(encode(f'}}\n\nKey: "{asked}"\nCorresponding value: "'))
        if len(head) + len(body) + len(pair) + len(tail) > tokens:
            break
        body += pair
    room = tokens - len(head) - len(tail)
    return [*head, *(body + pair)[:room], *tail][:tokens]


def long_text(tokens: int, encode: Encode) -> list[int]:
    """Take paragraphs of Python's language reference, one behind the other, until they are so many tokens.

    Raises
    ------
    EvalError
        There is less of it.
    """
    found: list[int] = []
    for text in paragraphs():
        found += encode(text + "\n\n")
        if len(found) >= tokens:
            return found[:tokens]
    raise EvalError(f"the text that comes with Python has {len(found)} tokens; {tokens} asked")


def read_prompts(path: Path, tokens: int, encode: Encode) -> list[list[int]]:
    """Read a file of JSON lines; what is longer is cut.

    Parameters
    ----------
    path : Path
        Each line an object with ``text``, ``prompt`` or ``input``, or a string.
    tokens : int
        Longest prompt.
    encode : Encode
        Of the model.

    Raises
    ------
    EvalError
        A file that cannot be read or holds no prompt; one line.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise EvalError(f"samples {path} cannot be read ({error}); give JSON lines") from error
    found = [
        list(encode(_text(line, path, number)))[:tokens]
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not found:
        raise EvalError(f"samples {path} hold no prompt; give one JSON object per line")
    return found


def _text(line: str, path: Path, number: int) -> str:
    try:
        value = json.loads(line)
    except ValueError:
        raise EvalError(f"line {number} of samples {path} is no JSON") from None
    if isinstance(value, dict):
        value = next((value[name] for name in _TEXT_FIELDS if name in value), None)
    if not isinstance(value, str) or not value:
        raise EvalError(
            f"line {number} of samples {path} has no text; give a field {', '.join(_TEXT_FIELDS)}"
        )
    return value
