"""The nouns of the pipeline: spans, layouts, requests, answers. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from retrievers.types import Chunk, SearchHit


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """Half-open range ``[start, end)`` of token positions in a prompt.

    Parameters
    ----------
    start, end
        Token offsets into :attr:`PromptLayout.input_ids`.
    chunk_id
        The chunk that fills the range; ``None`` for the system part and the question.
    """

    start: int
    end: int
    chunk_id: str | None = None

    def __len__(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptLayout:
    """A prompt as token ids, with the place of every part.

    The parts stand in the order system, chunks, question, touch each other, and cover the prompt.

    Parameters
    ----------
    input_ids
        Token ids of the whole prompt.
    system_span, question_span
        First and last part. The system part is the same for every question asked with the same
        builder; the question part includes what the chat template puts after it.
    chunk_spans
        One span a chunk, in prompt order.
    text
        The prompt as text, special tokens written out.
    chunks
        The retrieved chunks of `chunk_spans`, in the same order.
    dropped
        Retrieved chunks that did not fit the context, best first.
    """

    input_ids: tuple[int, ...]
    system_span: Span
    chunk_spans: tuple[Span, ...]
    question_span: Span
    text: str
    chunks: tuple[SearchHit, ...] = ()
    dropped: tuple[SearchHit, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingOptions:
    """How the answer is decoded; the default is greedy.

    Parameters
    ----------
    max_new_tokens
        Most tokens of the answer, at least 1.
    temperature
        0 is greedy.
    top_p
        Nucleus mass in (0, 1].
    stop
        Strings that end the answer; not part of it.
    repetition_penalty
        In (0, 2]; 1 is none. None takes what the model's ``generation_config.json`` names.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    repetition_penalty: float | None = None

    def __post_init__(self) -> None:
        from rag_pipeline.errors import RagPipelineError

        def refuse(name: str, value: object, allowed: str) -> None:
            raise RagPipelineError(f"{name} is {value!r}; it must be {allowed}")

        if isinstance(self.max_new_tokens, bool) or not isinstance(self.max_new_tokens, int):
            refuse("max_new_tokens", self.max_new_tokens, "a whole number, at least 1")
        if self.max_new_tokens < 1:
            refuse("max_new_tokens", self.max_new_tokens, "at least 1")
        if not self.temperature >= 0:
            refuse("temperature", self.temperature, "0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            refuse("top_p", self.top_p, "above 0 and at most 1")
        if self.repetition_penalty is not None and not 0 < self.repetition_penalty <= 2:
            refuse("repetition_penalty", self.repetition_penalty, "above 0 and at most 2")

    def filled(self, *, repetition_penalty: float, stop: str) -> SamplingOptions:
        """Return these options with the model's own penalty where none is given, and one more stop."""
        given = self.repetition_penalty
        return replace(
            self,
            repetition_penalty=repetition_penalty if given is None else given,
            stop=(*self.stop, stop),
        )

    def to_params(self) -> dict[str, Any]:
        """Write the sampling parameters as SGLang's engine and ``/generate`` take them."""
        params: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "repetition_penalty": 1.0
            if self.repetition_penalty is None
            else self.repetition_penalty,
        }
        if self.stop:
            params["stop"] = list(self.stop)
        return params


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationRequest:
    """One prompt for a backend.

    Parameters
    ----------
    input_ids
        Token ids of the prompt.
    spans
        Ranges of the prompt that may be served from the chunk cache.
    sampling
        How to decode.
    policy, ratio
        Selection policy of the fusion and its share of recomputed tokens in [0, 1]; policy
        ``prefix`` is ordinary prefill behind the radix tree and takes no ratio.
    build
        Prefill as usual and keep the KV of the one span, which stands right behind the shared
        prefix; policy and ratio play no part.
    passage
        With `build`: compute the chunk behind the engine's neutral passage, for use away from its own place.
    """

    input_ids: tuple[int, ...]
    spans: tuple[Span, ...] = ()
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    policy: str = "prefix"
    ratio: float | None = None
    build: bool = False
    passage: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationPiece:
    """What a backend hands out while it generates.

    Parameters
    ----------
    text
        Text that is new since the piece before.
    meta_info
        The engine's report on the request so far (token counts, finish reason).
    """

    text: str
    meta_info: Mapping[str, Any]


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
class Usage:
    """Tokens of one answer; the four kinds of prompt tokens add up to `prompt_tokens`.

    Parameters
    ----------
    prompt_tokens
        Tokens of the whole prompt.
    exact_prefix_tokens
        Served by the radix tree (exact).
    reused_tokens
        Served from the chunk cache without recomputation (approximate).
    recomputed_tokens
        Found in the chunk cache and recomputed in place.
    fresh_tokens
        Computed by ordinary prefill.
    completion_tokens
        Tokens of the answer.
    """

    prompt_tokens: int
    exact_prefix_tokens: int
    reused_tokens: int
    recomputed_tokens: int
    fresh_tokens: int
    completion_tokens: int


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
    answer
        The generated text, outer white space removed.
    sources
        Chunks in the prompt, in prompt order.
    usage, timing
        Token counts and seconds.
    policy, ratio
        As asked.
    dropped_sources
        Retrieved chunks that did not fit the context.
    finish_reason
        ``stop``, ``length`` or ``abort`` as the engine reports it.
    """

    answer: str
    sources: tuple[Source, ...]
    usage: Usage
    timing: Timing
    policy: str
    ratio: float | None
    dropped_sources: tuple[Source, ...] = ()
    finish_reason: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the JSON contract of ``rag-pipeline ask`` plus ``dropped_sources``."""
        return {
            "answer": self.answer,
            "sources": [source.to_json() for source in self.sources],
            "usage": asdict(self.usage),
            "timing": asdict(self.timing),
            "policy": self.policy,
            "ratio": self.ratio,
            "dropped_sources": [source.to_json() for source in self.dropped_sources],
        }
