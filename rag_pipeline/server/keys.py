"""Keys of the server: where they come from, what is no key, and how one is compared.

A key that is set and empty is an unset variable of a script, and never means that no key is wanted.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from rag_pipeline.errors import RagPipelineError

MIN_KEY = 16
"""Characters of a key that cannot be guessed by trying."""

API_KEY_VARIABLE = "RAG_PIPELINE_API_KEY"
ADMIN_API_KEY_VARIABLE = "RAG_PIPELINE_ADMIN_API_KEY"

_EVERYBODYS = (
    "",
    "test",
    "secret",
    "password",
    "changeme",
    "api-key",
    "key",
    "EMPTY",
    "token-abc123",
)


def digest_of(key: str) -> str:
    """SHA-256 of a key, in hexadecimal: keys are looked up by it, so the time says nothing about them."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


EVERYBODYS_DIGESTS = frozenset(map(digest_of, _EVERYBODYS))
"""Digests of words that stand in manuals."""


def check_key(key: str, where: str) -> str:
    """Return a key that a header can carry.

    Raises
    ------
    RagPipelineError
        Empty, blank, or with a character that no ``Authorization`` header carries.
    """
    if not key.strip():
        raise RagPipelineError(
            f"{where} is empty; give a key, or leave it out to serve this machine without one"
        )
    if not all("!" <= letter <= "~" for letter in key):
        raise RagPipelineError(f"{where} holds a space or a letter beyond ASCII; take neither")
    return key


def read_key(*, flag: str, given: str | None, file: Path | None, variable: str) -> str | None:
    """Take a key from a flag, a file or the environment; None where none of them is there.

    Parameters
    ----------
    flag : str
        Name of the flag, for messages; ``FLAG-file`` names the file.
    given, file : str or None, Path or None
        What the flags say.
    variable : str
        Environment variable. It is taken out of the environment, which child processes inherit.

    Raises
    ------
    RagPipelineError
        Two sources, a file that cannot be read, or a key that is none.
    """
    found = os.environ.pop(variable, None)
    named = [
        (flag, given),
        (f"{flag}-file", None if file is None else _read(flag, file)),
        (variable, found),
    ]
    there = [(where, key) for where, key in named if key is not None]
    if len(there) > 1:
        raise RagPipelineError(
            f"{' and '.join(where for where, _ in there)} both give a key; keep one"
        )
    return check_key(there[0][1], there[0][0]) if there else None


def _read(flag: str, file: Path) -> str:
    try:
        lines = file.expanduser().read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise RagPipelineError(f"{flag}-file {file} cannot be read: {reason}") from None
    if len(lines) > 1:
        raise RagPipelineError(f"{flag}-file {file} has {len(lines)} lines; it must hold one key")
    return lines[0].strip() if lines else ""
