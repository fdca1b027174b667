"""The nouns of data sets: a passage, an example, and how examples become prompts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from rag_eval.errors import EvalError

Encode = Callable[[str], list[int]]
"""Token ids of a text tokenised alone, without special tokens."""

Order = Literal["given", "shuffled", "gold_first", "gold_last"]
ORDERS: tuple[Order, ...] = ("given", "shuffled", "gold_first", "gold_last")

SHORT_ANSWER = (
    "Answer the question using only the passages below. "
    "Give nothing but the answer, in at most five words."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Passage:
    """One text that a prompt may contain.

    Parameters
    ----------
    title, text : str
        As the data set gives them; the title may be empty.
    is_gold : bool or None
        Whether the data set marks it as needed for the answer; ``None`` where it says nothing.
    """

    title: str
    text: str
    is_gold: bool | None = None

    @property
    def body(self) -> str:
        """The passage as it stands in a prompt."""
        return f"{self.title}\n{self.text}" if self.title else self.text


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One question with its accepted answers and its own passages.

    Parameters
    ----------
    id : str
        Unique inside its data set; a run resumes by it.
    question : str
        Question text.
    answers : tuple of str
        Accepted answers, best first. The first one is the teacher-forced gold answer.
    passages : tuple of Passage
        The data set's own contexts; empty when it leaves retrieval to the reader.
    instruction : str
        What stands in the shared prefix before the chunks.
    lead : str
        Start of the assistant's turn, given to the model and not part of the answer.
    answer_parts : tuple of str
        When set, every part must occur in the answer (RULER's "match all"); `answers` then holds
        their joined form.
    ready_chunks : bool
        The passages already are chunks of the wanted length, so they are not joined or padded.
    """

    id: str
    question: str
    answers: tuple[str, ...]
    passages: tuple[Passage, ...] = ()
    instruction: str = SHORT_ANSWER
    lead: str = ""
    answer_parts: tuple[str, ...] = ()
    ready_chunks: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetOptions:
    """How prompts are made from examples (and how generators make examples).

    Parameters
    ----------
    chunks : int
        Chunks per prompt.
    chunk_tokens : int
        Target length of a chunk in tokens: short passages are joined, long ones cut.
    distractors : int or None
        Passages without the answer that a prompt may take at most; ``None`` fills every chunk.
    order : Order
        ``shuffled`` (by seed), ``gold_first``, ``gold_last``, or ``given``.
    zipf : float or None
        Exponent of the Zipf law by which distractors are drawn from the corpus shared by all
        examples, so that chunks recur between prompts; ``None`` takes the example's own.
    seed : int
        Same seed, same prompts.
    """

    chunks: int = 6
    chunk_tokens: int = 280
    distractors: int | None = None
    order: Order = "shuffled"
    zipf: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.chunks <= 64:
            raise EvalError(f"chunks is {self.chunks}; allowed: 1 to 64")
        if not 16 <= self.chunk_tokens <= 32_768:
            raise EvalError(f"chunk_tokens is {self.chunk_tokens}; allowed: 16 to 32768")
        if self.distractors is not None and self.distractors < 0:
            raise EvalError(f"distractors is {self.distractors}; allowed: 0 or more")
        if self.order not in ORDERS:
            raise EvalError(f"order is {self.order!r}; allowed: {', '.join(ORDERS)}")
        if self.zipf is not None and self.zipf <= 0:
            raise EvalError(f"zipf is {self.zipf}; allowed: a positive exponent")
