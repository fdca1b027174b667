"""From a chat's messages to one RAG prompt: what to retrieve by, and what the question part says.

Chunks always stand right behind the one shared system part, so that their stored KV fits. What a client
says of its own (a system message, earlier turns) therefore stands in the question part, behind them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rag_pipeline.prompts.builder import DEFAULT_QUESTION_TEMPLATE, echo_of
from rag_pipeline.prompts.history import NAMES, HistoryMessage, Turn, turns_of
from rag_pipeline.server.schemas import MAX_QUERY, Message

QUESTION_TEMPLATE = "{question}"
"""Template for the builder: :func:`read_conversation` writes how the answer shall be."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """What a chat comes to.

    Parameters
    ----------
    query : str
        The beginning of the last user message: what is retrieved by.
    rules : str
        What the client's system messages say.
    turns : tuple
        Earlier turns, the oldest first.
    said : str
        The last user message, all of it.
    asked : str
        The question, with how it is to be answered.
    echo : str
        Text at which the answer ends: the question over again.
    """

    query: str
    rules: str
    turns: tuple[Turn, ...]
    said: str
    asked: str
    echo: str


def read_conversation(messages: Sequence[Message]) -> Conversation:
    """Turn messages, the last one a user's, into query and the parts of the question part."""
    query = messages[-1].text().strip()
    rules = [m.text().strip() for m in messages if m.role in ("system", "developer")]
    rules = [rule for rule in rules if rule]
    earlier = [HistoryMessage(role=m.role, text=m.text()) for m in messages[:-1] if m.role in NAMES]
    # A client with rules of its own says itself how long an answer is to be.
    template = "Question: {question}" if rules else DEFAULT_QUESTION_TEMPLATE
    asked = template.format(question=query)
    # A long message is no mistake, and no embedder reads all of it; a search costs by its length.
    return Conversation(
        query=query[:MAX_QUERY],
        rules="\n".join(rules),
        turns=turns_of(earlier),
        said=query,
        asked=asked,
        echo=echo_of(asked),
    )
