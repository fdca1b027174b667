"""What of a conversation stays when it no longer fits the context: the oldest turns are cut, whole ones.

CachedAttention (arXiv 2403.19708, section 3.4) cuts half the window at once, so that it happens rarely and the turns
that stay keep their place, and their cached KV, for many turns. A client sends the whole conversation each time and
nothing is remembered here, so the places of possible cuts must follow from the conversation alone: they are the first
turns behind every half window (:data:`CUT_SHARE`), whatever the present question, its chunks and its answer take.
Two prompts of one conversation are then cut at the same place, or one of them a half window later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, TypeVar, get_args

from rag_pipeline.errors import RagPipelineError
from rag_pipeline.types import Truncated

T = TypeVar("T")

Truncation = Literal["auto", "disabled"]
"""OpenAI's words: ``auto`` cuts the oldest turns of a conversation that does not fit, ``disabled`` refuses it."""

CUT_SHARE = 0.5
"""Part of the context that is cut at once."""

_SAMPLE = 512
"""Characters of a turn that its length is estimated by: the places of cuts need no more, and a request may be long."""


def check_truncation(truncation: str, share: float = CUT_SHARE) -> None:
    """Refuse an unknown policy, or a share of the context that cannot be cut.

    Raises
    ------
    RagPipelineError
        One line that says what is allowed.
    """
    if truncation not in get_args(Truncation):
        raise RagPipelineError(
            f"truncation is {truncation!r}; choose one of {', '.join(get_args(Truncation))}"
        )
    if not 0 < share <= 1:
        raise RagPipelineError(f"cut_share is {share}; give a part of the context, above 0 to 1")


def estimated_tokens(text: str, encode: Callable[[str], Sequence[int]]) -> int:
    """Tokens of a text, exact for a short one; for a long one what its beginning lets expect."""
    sample = text[:_SAMPLE]
    return -(-len(encode(sample)) * len(text) // len(sample)) if sample else 0


def truncated(lengths: Sequence[int], turns: int) -> Truncated:
    """Sum up a cut of so many oldest turns."""
    return Truncated(turns, sum(lengths[:turns]))


def cut_points(
    lengths: Sequence[int], context_length: int, share: float = CUT_SHARE
) -> Iterator[int]:
    """Numbers of oldest turns that may be cut, rising: 0, then those at every share of the context, then all.

    What leaves more than two contexts is left out: it need not be tried.

    Parameters
    ----------
    lengths : sequence of int
        Tokens of each turn, the oldest first.
    context_length : int
        Tokens of the context.
    share : float
        Part of it that is cut at once.
    """
    unit = max(1, int(context_length * share))
    left, before, grid = sum(lengths), 0, 0
    for turn, length in enumerate(lengths):
        if before >= grid:
            if left <= 2 * context_length:
                yield turn
            grid = (before // unit + 1) * unit
        before += length
        left -= length
    yield len(lengths)


def first_that_fits(
    lengths: Sequence[int],
    lay_out: Callable[[int], T],
    fits: Callable[[T], bool],
    *,
    context_length: int,
    truncation: Truncation = "auto",
    share: float = CUT_SHARE,
) -> tuple[T, int]:
    """Lay out a conversation with as few of its oldest turns cut as fit.

    Parameters
    ----------
    lengths : sequence of int
        Tokens of each turn that may be cut, the oldest first.
    lay_out : callable
        Makes the prompt without so many oldest turns.
    fits : callable
        Whether a prompt fits.
    context_length : int
        Tokens of the context.
    truncation : str
        With ``disabled`` nothing is cut.
    share : float
        Part of the context that is cut at once.

    Returns
    -------
    tuple
        The prompt, and the number of turns that were cut. Where nothing fits, that with the fewest turns.
    """
    cuts = iter((0,)) if truncation == "disabled" else cut_points(lengths, context_length, share)
    made = lay_out(cut := next(cuts))
    for more in cuts:
        if fits(made):
            break
        made = lay_out(cut := more)
    return made, cut
