"""Text to calibrate on and text to measure on, which have no paragraph in common, as windows of token ids."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rag_pipeline.conversion.config import ConversionError

CORPUS = "pydoc-topics"
"""Python's language reference, which every CPython carries: three quarters of its topics, or the fourth."""
_FIELDS = ("text", "prompt", "input")
_LEAST_PARAGRAPH = 40
"""Characters from which on a paragraph is known again; shorter ones stand in any text."""

Encode = Callable[[str], Sequence[int]]
"""Token ids of a text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Windows:
    """Token ids to compute together.

    Parameters
    ----------
    name : str
        Of the text they come from.
    rows : tuple of tuple of int
        Windows of equal length.
    """

    name: str
    rows: tuple[tuple[int, ...], ...]

    @property
    def tokens(self) -> int:
        """Tokens in all windows."""
        return sum(map(len, self.rows))


def read_text(source: str, *, held_out: bool) -> str:
    """Read plain text, the strings of JSON lines, or the built-in corpus.

    Parameters
    ----------
    source : str
        Path of a file, those that end in ``.jsonl`` with one string or object per line, or :data:`CORPUS`.
    held_out : bool
        Which part of the corpus: the topics to measure on, or those to calibrate on.

    Raises
    ------
    ConversionError
        The file cannot be read, or holds no text.
    """
    if source == CORPUS and not Path(source).exists():
        from retrievers.loaders.topics import load_topics

        topics = list(load_topics())
        return "\n\n".join(
            topic.text for at, topic in enumerate(topics) if (at % 4 == 0) == held_out
        )
    path = Path(source)
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConversionError(
            f"text {source} cannot be read ({reason}); give a UTF-8 file, or {CORPUS}"
        ) from error
    if path.suffix == ".jsonl":
        lines = enumerate(text.splitlines(), 1)
        text = "\n\n".join(_string(line, path, at) for at, line in lines if line.strip())
    if not text.strip():
        raise ConversionError(f"text {source} is empty; give one that the model would read")
    return text


def _string(line: str, path: Path, number: int) -> str:
    try:
        value = json.loads(line)
    except ValueError:
        raise ConversionError(f"line {number} of {path} is no JSON") from None
    if isinstance(value, dict):
        value = next((value[name] for name in _FIELDS if name in value), None)
    if not isinstance(value, str):
        raise ConversionError(
            f"line {number} of {path} has no text; give a string, or a field {', '.join(_FIELDS)}"
        )
    return value


def paragraphs(text: str) -> list[str]:
    """Blocks between empty lines."""
    return [block for block in re.split(r"\n\s*\n", text) if block.strip()]


def without(text: str, known: Iterable[str]) -> str:
    """Leave out paragraphs that stand in any of the `known` texts, however they are wrapped."""
    seen = {_plain(block) for other in known for block in paragraphs(other)}
    return "\n\n".join(
        block
        for block in paragraphs(text)
        if len(_plain(block)) < _LEAST_PARAGRAPH or _plain(block) not in seen
    )


def _plain(block: str) -> str:
    return " ".join(block.split())


def windows_of(
    name: str,
    texts: Sequence[str],
    encode: Encode,
    *,
    start: Sequence[int],
    length: int,
    tokens: int,
) -> Windows:
    """Cut texts into windows, and take some that lie evenly apart.

    Parameters
    ----------
    name : str
        What to call them.
    texts : sequence of str
        Each is cut alone.
    encode : Encode
        Of the model.
    start : sequence of int
        Ids that the model expects before a text, such as its BOS; every window begins with them.
    length, tokens : int
        Of a window, and most of all together.
    """
    rows: list[tuple[int, ...]] = []
    room = length - len(start)
    for text in texts:
        ids = encode(text)
        cuts = range(0, len(ids) - room + 1, room)
        rows += [(*start, *ids[at : at + room]) for at in cuts]
    count = min(len(rows), max(1, tokens // length))
    taken = [rows[at * len(rows) // count] for at in range(count)]
    return Windows(name=name, rows=tuple(taken))


def read_windows(
    calibration: Sequence[str],
    held_out: Sequence[str],
    encode: Encode,
    *,
    start: Sequence[int],
    length: int,
    tokens: int,
    held_out_tokens: int,
    least: int,
) -> tuple[Windows, list[Windows]]:
    """Read all texts, and keep those to measure on apart from those to calibrate on.

    Parameters
    ----------
    calibration, held_out : sequence of str
        As for :func:`read_text`.
    encode, start, length, tokens : Encode, sequence of int, int, int
        As for :func:`windows_of`.
    held_out_tokens : int
        Most tokens of each text to measure on.
    least : int
        Tokens that calibration cannot do without.

    Raises
    ------
    ConversionError
        Too little to calibrate on, or nothing to measure on that is not calibrated on as well.
    """
    known = [read_text(source, held_out=False) for source in calibration]
    found = windows_of("calibration", known, encode, start=start, length=length, tokens=tokens)
    if found.tokens < least:
        raise ConversionError(
            f"the calibration text gives {found.tokens} tokens in windows of {length}; this model needs at least "
            f"{least}: give more text, or more calibration tokens"
        )
    measured: list[Windows] = []
    for source in held_out:
        text = read_text(source, held_out=True)
        rest = without(text, known)
        name = source if source == CORPUS else Path(source).stem
        windows = windows_of(
            name, [rest], encode, start=start, length=length, tokens=held_out_tokens
        )
        if not windows.rows:
            raise ConversionError(
                f"held-out text {source} has no {length} tokens that are not in the calibration text; "
                "give another one"
            )
        measured.append(windows)
    return found, measured
