"""The turns of a program's conversation, and a program's text without the oldest of them."""

from __future__ import annotations

from rag_pipeline.frontend.marked_text import MarkedText, marks_of

TRUNCATED_KEY = "rag_truncated"
"""In the ``meta_info`` of a generation: the turns that were cut for it (:class:`~rag_pipeline.types.Truncated`)."""


def turn_starts(text: str) -> tuple[int, ...]:
    """Characters at which turns begin: behind the system's messages, then at each user's message behind an answer.

    Only what the role helpers (``sgl.user`` and so on) wrote is known to be a message, so a program without them has
    no turns. What stands in front of the first turn belongs to none.

    Parameters
    ----------
    text : str
        A program's text; roles stand in its marks.
    """
    starts: list[int] = []
    before = ""
    for mark in marks_of(text):
        if not mark.role:
            continue
        begins = mark.role != "system" if not starts else mark.role == "user" != before
        if begins:
            starts.append(mark.start)
        before = mark.role
    return tuple(starts)


def without_turns(text: str, starts: tuple[int, ...], number: int) -> str:
    """Leave out so many oldest turns, of which the last one is none; marks stay."""
    whole = MarkedText(text, marks_of(text))
    return whole[: starts[0]] + whole[starts[number] :] if number else text
