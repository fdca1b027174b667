"""Messages as token ids that never change while a conversation grows.

Every message is tokenised alone, behind what the model's chat template writes between it and the message before. So
the ids of a message depend on its text and on two roles, and a history's ids are those of its messages, joined. The
prefix is all that stands in front of the first message's text.
"""

from __future__ import annotations

from rag_pipeline.errors import RagPipelineError
from rag_pipeline.memory.bounded import BoundedTable
from rag_pipeline.memory.plan import Utterance
from rag_pipeline.prompts.chat_template import template_parts
from rag_pipeline.prompts.tokenizer import ModelTokenizer
from retrievers import storable_text

ROLES = ("user", "assistant")

_KEPT_MESSAGES = 8192

Run = tuple[str, bool]
"""A text, and whether a template wrote it."""


class Renderer:
    """Token ids of the parts of a conversation's prompts, for one model.

    Parameters
    ----------
    tokenizer : ModelTokenizer
        The model's.
    """

    def __init__(self, tokenizer: ModelTokenizer) -> None:
        self.tokenizer = tokenizer
        self._messages: BoundedTable[tuple[Run, str], tuple[int, ...]] = BoundedTable(
            _KEPT_MESSAGES
        )
        self._pieces: BoundedTable[tuple[str, ...], list[str] | None] = BoundedTable(64)
        self.is_chat = self._template("user") is not None

    def prefix_ids(self, system: str, first_role: str) -> tuple[int, ...]:
        """Tokens in front of the first message's text, which no memory evicts."""
        return tuple(self.tokenizer.encode_runs(self._prefix(system.strip(), first_role)))

    def message_ids(self, before: str | None, message: Utterance) -> tuple[int, ...]:
        """Tokens of a message behind one of the role `before`; None for the first message."""
        lead = ("", True) if before is None else self._between(before, message.role)
        key = (lead, message.text)
        ids = self._messages.get(key)
        if ids is None:
            ids = tuple(self.tokenizer.encode_runs([lead, (message.text, False)]))
            self._messages.put(key, ids)
        return ids

    def lead_tokens(self, before: str | None, role: str) -> int:
        """How many tokens of :meth:`message_ids` stand in front of the message's text, about."""
        return (
            0 if before is None else len(self.tokenizer.encode_runs([self._between(before, role)]))
        )

    def question_ids(self, before: str | None, question: str) -> tuple[int, ...]:
        """Tokens of the new user message behind one of the role `before`, with the opening of the answer."""
        lead = ("", True) if before is None else self._between(before, "user")
        asked = self.tokenizer.date_note() + question
        return tuple(self.tokenizer.encode_runs([lead, (asked, False), self.opening]))

    @property
    def opening(self) -> Run:
        """What ends a user's message and opens the answer."""
        parts = self._template("user")
        return ("\nAnswer:", False) if parts is None else (parts[-1], True)

    def _prefix(self, system: str, first_role: str) -> list[Run]:
        if not self.is_chat:  # a base model
            head: list[Run] = [(self.tokenizer.bos_token or "", True)]
            return [*head, (f"{system}\n\n", False)] if system else head
        if system and (parts := self._template("system", first_role)) is not None:
            return [(parts[0], True), (system, False), (parts[1], True)]
        instruction: list[Run] = [(f"{system}\n\n", False)] if system else []
        if (parts := self._template(first_role)) is not None:
            return [(parts[0], True), *instruction]
        # A template that wants the user first: behind a message of the user that says nothing.
        return [*self._prefix(system, "user"), self._between("user", first_role)]

    def _between(self, before: str, role: str) -> Run:
        """What the template writes between two messages."""
        # A last turn may be written otherwise than the others, so one of the user stands behind.
        opening = () if before == "user" else ("user",)
        parts = self._template(*opening, before, role, "user")
        if parts is None and role == "user":
            parts = self._template(*opening, before, role)
        if parts is None:  # a template that takes turns only, or none
            return ("\n\n", False)
        return (parts[len(opening) + 1], True)

    def _template(self, *roles: str) -> list[str] | None:
        known = self._pieces.get(roles)
        if known is None:
            known = template_parts(self.tokenizer, roles)
            self._pieces.put(roles, known)
        return known


def checked(message: Utterance) -> Utterance:
    """Refuse a message of another role; outer white space is removed, as clients send it or not, and what UTF-8 cannot hold.

    Raises
    ------
    RagPipelineError
        One line: what was given, what is allowed.
    """
    if message.role not in ROLES or not isinstance(message.text, str):
        raise RagPipelineError(
            f"a conversation's memory holds a message of role {message.role!r:.40} whose text is a "
            f"{type(message.text).__name__}; give role user or assistant, and a text"
        )
    return Utterance(message.role, storable_text(message.text).strip())
