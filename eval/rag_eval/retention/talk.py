"""A conversation as token ids, its episodes, and its questions: what every variant of the study is measured on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rag_eval.datasets.talks import Conversation
from rag_eval.errors import EvalError
from rag_pipeline.memory.clustering import centres_of, cluster, medoids_of
from rag_pipeline.memory.plan import Utterance
from rag_pipeline.memory.probes import patched_probe
from rag_pipeline.memory.rendering import Renderer
from retrievers import TextEmbedder

SEGMENT = 4
"""Utterances of a segment."""
MEDOIDS = 4
"""Segments of a patched prompt."""
PROBE_TOKENS = 256
SYSTEM = "You answer questions about a conversation that you took part in. Answer in a few words."


@dataclass(frozen=True, kw_only=True, slots=True)
class AskedQuestion:
    """A question of the study.

    Attributes
    ----------
    id : str
        In its data set.
    ids, answer_ids : tuple of int
        The user's message with the opening of an answer, and the accepted answer.
    evidence : tuple of tuple of int
        Spans of the history, counted from its start, that hold the answer.
    episode : int
        Whose centre is nearest.
    """

    id: str
    ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    evidence: tuple[tuple[int, int], ...]
    episode: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Talk:
    """A conversation of the study.

    Attributes
    ----------
    system, history, tail : tuple of int
        Token ids: the system part, whole blocks of the history, and what is left behind them.
    probes : tuple of tuple of int
        Patched prompt of each episode.
    questions : tuple of AskedQuestion
        Asked behind the tail.
    """

    system: tuple[int, ...]
    history: tuple[int, ...]
    tail: tuple[int, ...]
    probes: tuple[tuple[int, ...], ...]
    questions: tuple[AskedQuestion, ...]


def lay_out(
    conversation: Conversation,
    renderer: Renderer,
    embedder: TextEmbedder,
    *,
    tokens: int,
    block_tokens: int,
    episodes: int,
    most_questions: int,
) -> Talk:
    """Tokenise the first utterances of a conversation, cluster them, and match its questions.

    Raises
    ------
    EvalError
        The conversation is shorter than ``tokens``.
    """
    said = [Utterance(one.role, one.text) for one in conversation.remarks]
    before = [None, *(one.role for one in said)]
    ids = [renderer.message_ids(role, one) for role, one in zip(before, said, strict=False)]
    lengths = [len(one) for one in ids]
    if sum(lengths) < tokens:
        raise EvalError(f"conversation {conversation.id} has {sum(lengths)} tokens; {tokens} asked")
    cut = conversation.cut(lengths, tokens, "first")
    count = len(cut.remarks)
    ends = np.cumsum(lengths[:count]).tolist()
    spans = {
        one.id: (end - length, end)
        for one, length, end in zip(cut.remarks, lengths, ends, strict=False)
    }
    history = tuple(token for one in ids[:count] for token in one)
    whole = len(history) // block_tokens * block_tokens
    texts = [
        "\n".join(one.text for one in said[first : first + SEGMENT])
        for first in range(0, count, SEGMENT)
    ]
    vectors = embedder.encode_documents(texts)
    labels = cluster(vectors, episodes)
    number = max(labels) + 1
    centres = centres_of(vectors, labels, number)
    probes = []
    for episode in range(number):
        members = [i for i, label in enumerate(labels) if label == episode]
        medoids = sorted(medoids_of(vectors, members, MEDOIDS))
        probes.append(patched_probe(renderer, [texts[i] for i in medoids], PROBE_TOKENS))
    chosen = _spread(len(cut.questions), most_questions)
    questions = [
        AskedQuestion(
            id=one.id,
            ids=renderer.question_ids(said[count - 1].role, one.text),
            answer_ids=tuple(renderer.tokenizer.encode(one.answer)),
            evidence=tuple(spans[name] for name in one.evidence),
            episode=int(np.argmax(centres @ embedder.encode_query(one.text))),
        )
        for one in (cut.questions[i] for i in chosen)
    ]
    return Talk(
        system=renderer.prefix_ids(SYSTEM, said[0].role),
        history=history[:whole],
        tail=history[whole:],
        probes=tuple(probes),
        questions=tuple(questions),
    )


def _spread(count: int, most: int) -> Sequence[int]:
    """Spread at most so many indices evenly over a count."""
    if count <= most:
        return range(count)
    return [i * count // most for i in range(most)]
