"""The earlier turns of a chat as text in the question part of a prompt, behind its chunks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rag_pipeline.errors import RagPipelineError

NAMES = {"user": "User", "assistant": "Assistant"}
"""How the two sides of a chat are called in the prompt, by OpenAI's role."""

Turn = tuple["HistoryMessage", ...]
"""A user's messages with the answers to them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HistoryMessage:
    """An earlier message of a chat.

    Parameters
    ----------
    role : str
        ``user`` or ``assistant``.
    text : str
        What was said.
    """

    role: str
    text: str

    @classmethod
    def read(cls, given: HistoryMessage | Mapping[str, object]) -> HistoryMessage:
        """Read one, or a mapping of OpenAI's ``role`` and ``content``.

        Raises
        ------
        RagPipelineError
            Another role, or a content that is no text.
        """
        if isinstance(given, HistoryMessage):
            role, text = given.role, given.text
        elif isinstance(given, Mapping):
            role, text = given.get("role"), given.get("content")  # type: ignore[assignment]
        else:
            raise RagPipelineError(
                f"history holds a {type(given).__name__}; give mappings of role and content"
            )
        if role not in NAMES or not isinstance(text, str):
            raise RagPipelineError(
                f"history holds a message of role {role!r:.40} whose content is a {type(text).__name__}; "
                "give role user or assistant, and a text"
            )
        return cls(role=role, text=text)


def turns_of(messages: Iterable[HistoryMessage]) -> tuple[Turn, ...]:
    """Group messages into turns: each begins with a user's message behind an answer; empty messages are left out."""
    turns: list[list[HistoryMessage]] = []
    for message in messages:
        if not message.text.strip():
            continue
        begins = message.role == "user" and (not turns or turns[-1][-1].role != "user")
        if begins or not turns:
            turns.append([])
        turns[-1].append(message)
    return tuple(tuple(turn) for turn in turns)


def write_turn(turn: Turn) -> str:
    """One line per message."""
    return "\n".join(f"{NAMES[message.role]}: {message.text.strip()}" for message in turn)


def question_part(asked: str, turns: Sequence[Turn] = (), rules: str = "") -> str:
    """Write rules, earlier turns and question, as far as there are any."""
    parts = [rules] if rules else []
    if turns:
        written = "\n".join(write_turn(turn) for turn in turns)
        parts.append(f"The conversation so far:\n{written}")
    return "\n\n".join([*parts, asked])
