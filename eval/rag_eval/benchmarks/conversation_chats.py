"""Long chats for ``benchmarks.conversation``: windows of a LoCoMo file, or made of real text."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rag_eval.datasets.core import Encode
from rag_eval.datasets.filler import paragraphs, sentences
from rag_eval.datasets.locomo import ordered_sessions
from rag_eval.errors import EvalError
from rag_pipeline.prompts.chat_template import (
    ChatTurn,
    conversation_segments,
    shared_prefix_len,
)
from rag_pipeline.prompts.segments import Segment, SegmentEncoder

SYSTEM = "You are a friend who remembers what was said and answers in the same tone."

Exchange = tuple[str, str]
"""What the user said, and the answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LongChat:
    """Exchanges that fill a window, and the one that follows.

    Attributes
    ----------
    id : str
        For messages.
    exchanges : tuple of Exchange
        The oldest first; together about a window.
    following : Exchange
        The next question with its answer.
    """

    id: str
    exchanges: tuple[Exchange, ...]
    following: Exchange


def read_locomo(file: Path) -> list[list[Exchange]]:
    """Conversations of a file of the LoCoMo data set (arXiv 2402.17753), all sessions of each in one.

    Raises
    ------
    EvalError
        Another format.
    """
    try:
        samples: list[dict[str, Any]] = json.loads(file.read_text())
        return [_exchanges(sample["conversation"]) for sample in samples]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EvalError(
            f"{file} is no LoCoMo file ({error!r}); give one, or leave it out"
        ) from None


def _exchanges(talk: dict[str, Any]) -> list[Exchange]:
    first = talk["speaker_a"]
    runs: list[tuple[bool, list[str]]] = []
    for line in (line for _, lines in ordered_sessions(talk) for line in lines):
        is_user = line["speaker"] == first
        if not runs or runs[-1][0] != is_user:
            runs.append((is_user, []))
        runs[-1][1].append(str(line["text"]))
    texts = [" ".join(said) for _, said in runs[0 if runs[0][0] else 1 :]]
    return list(zip(texts[::2], texts[1::2], strict=False))


def make_talks(count: int, exchanges: int, seed: int) -> list[list[Exchange]]:
    """Talks of real sentences: a question about the beginning of a paragraph, answered with the paragraph."""
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        source = rng.sample(paragraphs(), min(exchanges, len(paragraphs())))
        made.append(
            [(f"What about this? {sentences(text)[0][:120]}", text[:600]) for text in source]
        )
    return made


def windows_of(
    talks: Sequence[Sequence[Exchange]], encode: Encode, *, tokens: int, least: int, limit: int
) -> list[LongChat]:
    """Cut talks into chats of about so many tokens, no exchange twice; one of each talk in turn.

    Parameters
    ----------
    talks : sequence
        Of exchanges.
    encode : callable
        Token ids of a text.
    tokens : int
        Most tokens of a chat.
    least : int
        Fewest exchanges.
    limit : int
        Most chats.

    Raises
    ------
    EvalError
        No talk is long enough.
    """
    by_talk: list[list[LongChat]] = []
    for number, talk in enumerate(talks):
        found: list[LongChat] = []
        window: list[Exchange] = []
        size = 0
        for exchange in talk:
            # Ten tokens around two messages.
            length = sum(len(encode(text)) for text in exchange) + 10
            if size + length > tokens and window:
                if len(window) >= least:
                    found.append(
                        LongChat(
                            id=f"{number}-{len(found)}",
                            exchanges=tuple(window),
                            following=exchange,
                        )
                    )
                window, size = [], 0
            window.append(exchange)
            size += length
        by_talk.append(found)
    longest = max(map(len, by_talk), default=0)
    chats = [found[at] for at in range(longest) for found in by_talk if at < len(found)]
    if not chats:
        raise EvalError(f"no talk has {tokens} tokens in {least} exchanges; lower --window")
    return chats[:limit]


def lay_out(
    encoder: SegmentEncoder, exchanges: Sequence[Exchange], question: str
) -> tuple[tuple[int, ...], int]:
    """Token ids of a chat that ends with a question, and how many of them are the part that is never cut."""
    said = [("system", SYSTEM)]
    for user, assistant in exchanges:
        said += [("user", user), ("assistant", assistant)]
    turns = [
        ChatTurn(role=role, parts=(Segment(text=text),))
        for role, text in [*said, ("user", question)]
    ]
    segments, shared = conversation_segments(encoder.tokenizer, turns)
    ids, _ = encoder.encode(segments)
    return ids, shared_prefix_len(encoder, ids, segments[:shared])
