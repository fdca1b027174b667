"""Texts for calibration and for scoring: files, windows over them, and proof that two of them do not overlap."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rag_eval.datasets import Encode, read_examples
from rag_eval.datasets.filler import paragraphs
from rag_eval.errors import EvalError

_RUN = 24
"""Tokens of a run that is hashed. A passage of twice as many that two texts share is always found."""


def read_text(path: Path | None) -> str:
    """Text of a file: the passages of a data set (JSON), each once, or the file as it is; Python's reference if none.

    Raises
    ------
    EvalError
        A file that cannot be read, or that holds no text; one line.
    """
    if path is None:
        return "\n\n".join(paragraphs())
    if {".json", ".jsonl"} & set(path.suffixes):
        examples = read_examples(path)
        bodies = [passage.text for example in examples for passage in example.passages]
        text = "\n\n".join(dict.fromkeys(bodies))
    else:
        try:
            text = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise EvalError(
                f"text {path} cannot be read ({reason}); give a UTF-8 file or a data set"
            ) from error
    if not text.strip():
        raise EvalError(f"text {path} holds no text")
    return text


def text_tokens(path: Path | None, encode: Encode, limit: int | None = None) -> list[int]:
    """Token ids of a text, the first ones if there is a limit."""
    found: list[int] = []
    # Piece by piece: a text of megabytes need not be tokenised for its first thousand tokens.
    for piece in read_text(path).split("\n\n"):
        found += encode(piece + "\n\n")
        if limit is not None and len(found) >= limit:
            return found[:limit]
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Windows:
    """How a text is cut into prompts and what follows them.

    Attributes
    ----------
    prompt : int
        Tokens of each prompt, which are prefilled.
    window : int
        Tokens of a prompt and what is decoded behind it, teacher-forced.
    """

    prompt: int
    window: int

    def __post_init__(self) -> None:
        if not 1 <= self.prompt <= self.window - 2:
            raise EvalError(
                f"prompt {self.prompt} and window {self.window}: a window holds a prompt of 1 token or more, and at "
                "least 2 tokens behind it"
            )

    @property
    def scored(self) -> int:
        """Tokens of a window that are scored: those predicted at decoded positions.

        The first token behind the prompt is predicted by its prefill, and is none of them.
        """
        return self.window - self.prompt - 1

    def cut(self, ids: Sequence[int], scored: int | None = None) -> list[Tensor]:
        """Windows of equal length, in order, such that each token is scored once at most.

        Parameters
        ----------
        ids : sequence of int
            The text.
        scored : int, optional
            Enough windows for so many scored tokens; all that fit if not given.

        Raises
        ------
        EvalError
            The text is too short for it.
        """
        starts = range(0, len(ids) - self.window + 1, self.scored)
        fit = len(starts) * self.scored
        if not fit or (scored is not None and fit < scored):
            raise EvalError(
                f"the text has {len(ids)} tokens, enough to score {fit} in windows of {self.window} with prompts of "
                f"{self.prompt}; {scored or self.scored} are to be scored: give more text, or ask for fewer or smaller ones"
            )
        count = len(starts) if scored is None else -(-scored // self.scored)
        return [torch.tensor(ids[start : start + self.window]) for start in starts[:count]]


def batches(windows: Sequence[Tensor], size: int) -> Iterator[Tensor]:
    """Windows as batches ``[size, window]``; the last one may be smaller."""
    for start in range(0, len(windows), size):
        yield torch.stack(list(windows[start : start + size]))


def marks_of(ids: Sequence[int]) -> Tensor:
    """Sorted hashes of a text's runs, one behind the other; int64."""
    return _hashes(ids)[::_RUN].unique()


def check_apart(ids: Sequence[int], marks: Tensor) -> None:
    """Refuse to score a text that a model was calibrated with.

    Raises
    ------
    EvalError
        Both share a run of tokens.
    """
    shared = int(torch.isin(_hashes(ids), marks).sum())
    if shared:
        raise EvalError(
            f"the text shares {shared} runs of {_RUN} tokens with the text of the calibration; give another one"
        )


def _hashes(ids: Sequence[int]) -> Tensor:
    """Hash of the run at each position where one begins."""
    known = torch.tensor(list(ids), dtype=torch.int64)
    total = torch.zeros(max(len(known) - _RUN + 1, 0), dtype=torch.int64)
    for place in range(_RUN):
        # Wraps around, as it should.
        total = total * 6364136223846793005 + known[place : place + len(total)] + 1442695040888963
    return total
