"""A conversation as token ids, its episodes, and its questions: what every variant of the study is measured on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rag_eval.datasets import Conversation
from rag_eval.errors import EvalError
from rag_pipeline.memory import MemoryConfig, Utterance
from rag_pipeline.memory.conversation import Conversations, TextVectors
from rag_pipeline.memory.layout import Question
from rag_pipeline.memory.methods.epicache import EpiCache
from rag_pipeline.memory.plan import Range
from rag_pipeline.memory.rendering import Renderer, checked
from retrievers import TextEmbedder

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
    own : tuple of tuple of tuple of (int, int)
        Of each episode and block, true positions of what is the episode's own by then; none where nothing is known of it.
    """

    system: tuple[int, ...]
    history: tuple[int, ...]
    tail: tuple[int, ...]
    probes: tuple[tuple[int, ...], ...]
    questions: tuple[AskedQuestion, ...]
    own: tuple[tuple[tuple[Range, ...], ...], ...] = ()


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
    """Tokenise the first utterances of a conversation, and find its episodes and match its questions as a memory does.

    Raises
    ------
    EvalError
        The conversation is shorter than ``tokens``.
    """
    said = [checked(Utterance(one.role, one.text)) for one in conversation.remarks]
    before = [None, *(one.role for one in said)]
    lengths = [
        len(renderer.message_ids(role, one)) for role, one in zip(before, said, strict=False)
    ]
    if sum(lengths) < tokens:
        raise EvalError(f"conversation {conversation.id} has {sum(lengths)} tokens; {tokens} asked")
    cut = conversation.cut(lengths, tokens, "first")
    count = len(cut.remarks)
    segments = count // MemoryConfig().segment_utterances
    config = MemoryConfig(
        episodes=episodes,
        block_tokens=block_tokens,
        probe_tokens=PROBE_TOKENS,
        # So that a short conversation has episodes, too.
        cluster_segments=max(1, min(MemoryConfig().cluster_segments, segments // episodes)),
    )
    vectors, method = TextVectors(embedder.encode_documents), EpiCache(config)
    view = Conversations(renderer, config, vectors).view(SYSTEM, said[:count])
    recipes = sorted(method.recipes(view, None), key=lambda one: one.episode)
    blocks = range(view.num_blocks)
    spans = {one.id: view.message_range(place) for place, one in enumerate(cut.remarks)}
    questions = []
    for one in (cut.questions[i] for i in _spread(len(cut.questions), most_questions)):
        ids = renderer.question_ids(view.last_role, one.text)
        asked = Question(
            view=view,
            text=one.text,
            ids=ids,
            room=0,
            encode=lambda text: vectors.of([text])[0],
        )
        questions.append(
            AskedQuestion(
                id=one.id,
                ids=ids,
                answer_ids=tuple(renderer.tokenizer.encode(one.answer)),
                evidence=tuple(spans[name] for name in one.evidence),
                episode=method.recipes(view, asked)[0].episode,
            )
        )
    whole = view.num_blocks * block_tokens
    return Talk(
        system=view.prefix_ids,
        history=view.ids(0, whole),
        tail=view.ids(whole, view.num_tokens),
        probes=tuple(one.probe(()) for one in recipes),
        questions=tuple(questions),
        own=tuple(tuple(one.maker(block).own(block) for block in blocks) for one in recipes),
    )


def _spread(count: int, most: int) -> Sequence[int]:
    """Spread at most so many indices evenly over a count."""
    if count <= most:
        return range(count)
    return [i * count // most for i in range(most)]
