"""The nouns of the pipeline: spans, layouts, answers. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from rag_pipeline.protocol import Usage
from retrievers.types import Chunk, SearchHit


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """Half-open range ``[start, end)`` of token positions in a prompt.

    Parameters
    ----------
    start, end : int
        Token offsets into :attr:`PromptLayout.input_ids`.
    chunk_id : str or None
        The chunk that fills the range; ``None`` for the system part and the question.
    """

    start: int
    end: int
    chunk_id: str | None = None

    def __len__(self) -> int:
        return self.end - self.start


class Truncated(NamedTuple):
    """What was cut of a conversation.

    Attributes
    ----------
    turns : int
        Oldest turns, each a question with its answer.
    tokens : int
        About so many; that of a long turn is estimated by its beginning.
    """

    turns: int = 0
    tokens: int = 0

    def to_json(self) -> dict[str, int]:
        """Keys ``turns`` and ``tokens``."""
        return self._asdict()


NOTHING_CUT = Truncated()
"""Of a conversation that fits, or of none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptLayout:
    """A prompt as token ids, with the place of every part.

    The parts stand in the order system, chunks, question, touch each other, and cover the prompt.

    Parameters
    ----------
    input_ids : tuple of int
        Token ids of the whole prompt.
    system_span, question_span : Span
        First and last part. The system part is the same for every question asked with the same
        builder; the question part includes what the chat template puts after it.
    chunk_spans : tuple of Span
        One span a chunk, in prompt order.
    text : str
        The prompt as text, special tokens written out.
    chunks : tuple of SearchHit
        The retrieved chunks of `chunk_spans`, in the same order.
    dropped : tuple of SearchHit
        Retrieved chunks that did not fit the context, best first.
    truncated : Truncated
        Oldest turns of the conversation that did not fit.
    """

    input_ids: tuple[int, ...]
    system_span: Span
    chunk_spans: tuple[Span, ...]
    question_span: Span
    text: str
    chunks: tuple[SearchHit, ...] = ()
    dropped: tuple[SearchHit, ...] = ()
    truncated: Truncated = NOTHING_CUT


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A chunk that stood in the prompt, as shown to the user."""

    id: str
    title: str
    path: str | None
    score: float
    text: str = ""

    @classmethod
    def from_hit(cls, hit: SearchHit) -> Source:
        """Source of one retrieved chunk."""
        chunk: Chunk = hit.chunk
        return cls(
            id=chunk.id, title=chunk.title, path=chunk.path, score=hit.score, text=chunk.text
        )

    def to_json(self) -> dict[str, Any]:
        """Keys ``id``, ``title``, ``path``, ``score``."""
        return {"id": self.id, "title": self.title, "path": self.path, "score": self.score}


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """Wall seconds: retrieval, from the start of generation to the first piece, all together."""

    retrieve_s: float
    ttft_s: float
    total_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """An answer with what it was made from and what it cost.

    Parameters
    ----------
    answer : str
        The generated text, outer white space removed.
    sources : tuple of Source
        Chunks in the prompt, in prompt order.
    usage, timing : Usage, Timing
        Token counts and seconds.
    policy, ratio : str, float or None
        As asked.
    dropped_sources : tuple of Source
        Retrieved chunks that did not fit the context.
    finish_reason : str or None
        ``stop``, ``length`` or ``abort`` as the engine reports it.
    truncated : Truncated
        Oldest turns of the conversation that did not fit the context.
    memory : mapping or None
        What a long conversation was answered from; None for all of it.
    """

    answer: str
    sources: tuple[Source, ...]
    usage: Usage
    timing: Timing
    policy: str
    ratio: float | None
    dropped_sources: tuple[Source, ...] = ()
    finish_reason: str | None = None
    truncated: Truncated = NOTHING_CUT
    memory: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the JSON contract of ``rag-pipeline ask`` plus ``dropped_sources``, and ``truncated`` and ``memory`` if any."""
        return {
            "answer": self.answer,
            "sources": [source.to_json() for source in self.sources],
            "usage": asdict(self.usage),
            "timing": asdict(self.timing),
            "policy": self.policy,
            "ratio": self.ratio,
            "dropped_sources": [source.to_json() for source in self.dropped_sources],
            **({"truncated": self.truncated.to_json()} if self.truncated.turns else {}),
            **({"memory": dict(self.memory)} if self.memory else {}),
        }
