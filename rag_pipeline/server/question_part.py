"""From a chat's messages to one RAG prompt: what to retrieve by, and what the question part says.

Chunks always stand right behind the one shared system part, so that their stored KV fits. What a client
says of its own (a system message, earlier turns) therefore stands in the question part, behind them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rag_pipeline.prompts.builder import DEFAULT_QUESTION_TEMPLATE, echo_of
from rag_pipeline.server.schemas import MAX_QUERY, Message

QUESTION_TEMPLATE = "{question}"
"""Template for the builder: :func:`read_conversation` writes the whole part."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """What a chat comes to.

    Parameters
    ----------
    query : str
        The beginning of the last user message: what is retrieved by.
    question : str
        The question part of the prompt.
    echo : str
        Text at which the answer ends: the question over again.
    """

    query: str
    question: str
    echo: str


def read_conversation(messages: Sequence[Message]) -> Conversation:
    """Turn messages, the last one a user's, into query and question part."""
    query = messages[-1].text().strip()
    rules = [m.text().strip() for m in messages if m.role in ("system", "developer")]
    earlier = [m for m in messages[:-1] if m.role in ("user", "assistant") and m.text().strip()]
    rules = [rule for rule in rules if rule]
    parts = ["\n".join(rules)] if rules else []
    if earlier:
        names = {"user": "User", "assistant": "Assistant"}
        turns = "\n".join(f"{names[m.role]}: {m.text().strip()}" for m in earlier)
        parts.append(f"The conversation so far:\n{turns}")
    # A client with rules of its own says itself how long an answer is to be.
    template = "Question: {question}" if rules else DEFAULT_QUESTION_TEMPLATE
    asked = template.format(question=query)
    parts.append(asked)
    # A long message is no mistake, and no embedder reads all of it; a search costs by its length.
    return Conversation(query=query[:MAX_QUERY], question="\n\n".join(parts), echo=echo_of(asked))
