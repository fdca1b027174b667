"""What of a conversation is near a question: sentence vectors and words (BM25), by reciprocal rank fusion.

EpiCache (https://arxiv.org/abs/2509.17396) compares a question with the centre of each episode. Deviation: segments are
ranked, and the best of them vote for their episodes. Of the evidence in the first 4,096 tokens of five LoCoMo conversations (123
questions) 0.73 lie in the episode nearest by its centre, 0.81 in the one that is voted for; of the first 7,600 (220 questions)
0.67 and 0.71.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rag_pipeline.prompts.builder import fitting
from retrievers import text_terms

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rag_pipeline.memory.clustering import Vectors
    from rag_pipeline.memory.conversation import View
    from rag_pipeline.memory.layout import Question

    Scores = NDArray[np.float64]

RANK_DAMPING = 60
"""Of reciprocal rank fusion, as published (Cormack, Clarke and Büttcher, SIGIR 2009)."""

VOTERS = 5
"""Best segments that vote for their episode: the first with weight 1, the n-th with 1/n."""

NEAR_SEGMENTS, NEAR_ROOMS = 16, 4
"""Messages are looked at one by one in so many of the best segments, or in more until they have so many times the room's
tokens. It bounds how many messages a question has embedded."""


class Words:
    """BM25 of some texts in memory, by bm25s, over the terms of our retrieval.

    Parameters
    ----------
    texts : sequence of str
        What is scored.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        import bm25s  # takes a second, and most methods need none of it

        logging.getLogger("bm25s").setLevel(
            logging.WARNING
        )  # it sets DEBUG, and tells of each index
        self._count = len(texts)
        found = [text_terms(text) for text in texts]
        self._bm25: Any = None
        if any(found):
            self._bm25 = bm25s.BM25(method="lucene")
            self._bm25.index(found, show_progress=False)

    def scores(self, query: str) -> Scores:
        """Score every text, ``(texts,)``; 0 for one that shares no term with `query`."""
        asked = list(dict.fromkeys(text_terms(query)))
        if self._bm25 is None or not asked:
            return np.zeros(self._count)
        found: Scores = np.asarray(self._bm25.get_scores(asked), dtype=np.float64)
        return found


def fused(near: Sequence[Scores | Vectors], words: Sequence[Scores]) -> Scores:
    """Fuse rankings of the same texts by the sum of ``1 / (60 + rank)``.

    Parameters
    ----------
    near, words : sequence of ndarray
        ``(texts,)`` each: similarities, and BM25 scores, where 0 is no rank at all. Ties go to the earlier text.
    """
    gains = 1 / (RANK_DAMPING + 1 + np.arange(len((*near, *words)[0])))
    total = np.zeros(len(gains))
    for scores in near:
        total[np.argsort(-scores, kind="stable")] += gains
    for scores in words:
        order = np.argsort(-scores, kind="stable")
        total[order] += np.where(scores[order] > 0, gains, 0.0)
    return total


def near_segments(view: View, text: str, vector: Vectors) -> Scores:
    """Score each whole segment of the history, ``(segments,)``; the higher, the nearer to a text and its vector."""
    count = view.num_segments
    if not count:
        return np.zeros(0)
    vectors = np.stack(view.segment_vectors(count))
    return fused([vectors @ vector], [view.segment_words(count).scores(text)])


def votes(near: Scores, labels: Sequence[int], episodes: int) -> Scores:
    """Share of the votes that each episode has, ``(episodes,)``, from the scores of its segments."""
    best = np.argsort(-near, kind="stable")[:VOTERS]
    weights = 1 / (1 + np.arange(len(best)))
    shares = np.zeros(episodes)
    np.add.at(shares, np.asarray(labels)[best], weights / weights.sum())
    return shares


def recalled(view: View, question: Question, end: int, room: int) -> list[int]:
    """Choose messages to repeat: those nearest to the question that fit, in the order of the conversation.

    A message is ranked by its own vector, its words, and how near its segment is, since an answer often stands beside what
    it answers.

    Parameters
    ----------
    view : View
        The history.
    question : Question
        The new message.
    end : int
        Only messages that end by this token of the history; what stands behind it is in the prompt anyway.
    room : int
        Tokens that there is place for.
    """
    size = view.config.segment_utterances
    last = view.message_at(end) if end < view.num_tokens else view.count
    if room <= 0 or not last:
        return []
    segments = question.near_segments
    messages: list[int] = []
    tokens = 0
    for place, segment in enumerate(np.argsort(-segments, kind="stable")):
        if place >= NEAR_SEGMENTS and tokens >= NEAR_ROOMS * room:
            break
        found = range(int(segment) * size, min(last, (int(segment) + 1) * size))
        messages += found
        tokens += sum(view.message_length(message) for message in found)
    messages += range(len(segments) * size, last)
    messages.sort()
    texts = [view.log.utterances[message].text for message in messages]
    own = np.stack(view.vectors.of(texts)) @ question.vector
    theirs = np.array([segments[m // size] if m // size < len(segments) else 0.0 for m in messages])
    order = np.argsort(-fused([own, theirs], [Words(texts).scores(question.text)]), kind="stable")
    kept = fitting([view.message_length(messages[at]) for at in order], room)
    return sorted(messages[order[at]] for at in kept)
