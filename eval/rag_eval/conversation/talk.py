"""A conversation as it is measured: cut to a length, with the place of each utterance and the budget of its memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rag_eval.conversation.config import FULL, ConversationConfig
from rag_eval.conversation.methods import SYSTEM
from rag_eval.conversation.recall import Range
from rag_eval.datasets import Conversation, Question
from rag_eval.errors import EvalError
from rag_pipeline import ModelTokenizer
from rag_pipeline.memory import MemoryConfig, Planner, Utterance

SentenceEncoder = Callable[[list[str]], NDArray[np.float32]]
"""Texts to unit vectors, ``(len(texts), dim)``."""

ROOM = 256
"""Tokens of a prompt besides history and answer: system part, question, and what a template writes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Talk:
    """A conversation that fits the model.

    Parameters
    ----------
    conversation : Conversation
        Cut.
    history : tuple of Utterance
        What was said, as a memory takes it.
    ranges : dict of str to Range
        True positions of each utterance's text, by id.
    tokens : int
        Of the whole history.
    budget : int
        Tokens of it that a method may keep.
    """

    conversation: Conversation
    history: tuple[Utterance, ...]
    ranges: dict[str, Range]
    tokens: int
    budget: int

    def places(self, question: Question) -> list[int]:
        """Which utterances hold the evidence of a question, counted from 0."""
        return [
            number
            for number, remark in enumerate(self.conversation.remarks)
            if remark.id in question.evidence
        ]

    def evidence(self, question: Question) -> list[Range]:
        """True positions of a question's evidence."""
        return [self.ranges[one] for one in question.evidence]


def place(
    config: ConversationConfig,
    whole: Conversation,
    tokenizer: ModelTokenizer,
    encode: SentenceEncoder,
    context: int,
) -> Talk:
    """Cut a conversation to the tokens that were asked for, or that fit the model, and place its utterances.

    Parameters
    ----------
    config : ConversationConfig
        Says how long it may be.
    whole : Conversation
        As the data set has it.
    tokenizer : ModelTokenizer
        The model's.
    encode : SentenceEncoder
        Sentence vectors; placing asks for none.
    context : int
        Longest prompt of the model.

    Raises
    ------
    EvalError
        The whole history is to be measured and does not fit, or no utterance fits.
    """
    room = context - ROOM - max(config.max_new_tokens, config.gold_tokens)
    most = room if config.max_tokens is None else config.max_tokens
    if most > room and FULL in config.method_names:
        raise EvalError(
            f"--max-tokens is {most}, but {config.model} has a context of {context} tokens, which leaves {room} for the "
            "history; give fewer, or leave out the method full"
        )
    planner = Planner(MemoryConfig(method=FULL), tokenizer, encode, context_length=1 << 30)
    told = planner.utterance_ranges(SYSTEM, _utterances(whole))
    kept = whole.cut([end - start for start, end in told], most, config.cut)
    history = _utterances(kept)
    places = planner.utterance_ranges(SYSTEM, history)
    tokens = places[-1][1] - places[0][0]
    return Talk(
        conversation=kept,
        history=history,
        ranges={remark.id: where for remark, where in zip(kept.remarks, places, strict=True)},
        tokens=tokens,
        budget=config.budget_for(tokens),
    )


def context_of(model: Path) -> int:
    """Longest prompt of a model, as its configuration says.

    Raises
    ------
    EvalError
        It says nothing of that.
    """
    facts = json.loads((model / "config.json").read_text("utf-8"))
    name = "max_position_embeddings"
    length = facts.get(name) or facts.get("text_config", {}).get(name)
    if not isinstance(length, int):
        raise EvalError(f"{model / 'config.json'} names no {name}; give a text model")
    return length


def _utterances(talk: Conversation) -> tuple[Utterance, ...]:
    return tuple(Utterance(remark.role, remark.text) for remark in talk.remarks)
