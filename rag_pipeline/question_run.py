"""One question on its way through the pipeline: checked, retrieved for, laid out, answered, timed."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rag_pipeline.errors import RagPipelineError
from rag_pipeline.prompts.builder import PromptBuilder
from rag_pipeline.protocol import (
    GenerationPiece,
    GenerationRequest,
    SamplingOptions,
    Usage,
    check_policy,
    finish_reason,
    fusion_request,
    usage_from_meta,
)
from rag_pipeline.types import Answer, PromptLayout, Source, Timing
from retrievers.types import SearchHit


@dataclass(kw_only=True, slots=True)
class AnswerRun:
    """A prompt whose answer comes in piece by piece; sync and async callers differ only in how they wait.

    :meth:`take` every piece, then read the rest. Times are seconds of ``time.perf_counter``.

    Parameters
    ----------
    layout : PromptLayout
        The prompt.
    request : GenerationRequest
        What the backend is sent.
    policy, ratio : str, float or None
        As asked.
    started, retrieved : float
        When the question came, and when its chunks were found.
    """

    layout: PromptLayout
    request: GenerationRequest
    policy: str
    ratio: float | None
    started: float
    retrieved: float
    first: float | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)
    text: str = ""

    def take(self, piece: GenerationPiece) -> str:
        """Note one piece and return the text to hand on; leading white space is dropped."""
        if self.first is None:
            self.first = time.perf_counter()
        self.meta = {**self.meta, **piece.meta_info}
        text = piece.text if self.text else piece.text.lstrip()
        self.text += text
        return text

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        return usage_from_meta(self.meta, prompt_tokens=len(self.layout.input_ids))

    @property
    def finish(self) -> str | None:
        """Why the answer ended, as the engine says."""
        return finish_reason(self.meta)[0]

    def timing(self) -> Timing:
        """Seconds so far."""
        now = time.perf_counter()
        return Timing(
            retrieve_s=self.retrieved - self.started,
            ttft_s=(self.first or now) - self.retrieved,
            total_s=now - self.started,
        )

    def answer(self) -> Answer:
        """Sum up when the last piece has come."""
        return Answer(
            answer=self.text.strip(),
            sources=tuple(Source.from_hit(hit) for hit in self.layout.chunks),
            usage=self.usage,
            timing=self.timing(),
            policy=self.policy,
            ratio=self.ratio,
            dropped_sources=tuple(Source.from_hit(hit) for hit in self.layout.dropped),
            finish_reason=self.finish,
        )


@dataclass(kw_only=True, slots=True)
class QuestionRun:
    """A checked question; made by :meth:`start`, and by :meth:`lay_out` turned into a prompt."""

    question: str
    top_k: int
    sampling: SamplingOptions
    policy: str
    ratio: float | None
    started: float

    @classmethod
    def start(
        cls,
        question: str,
        top_k: int,
        sampling: SamplingOptions | None,
        policy: str,
        ratio: float | None,
    ) -> QuestionRun:
        """Check everything that can be checked before any work."""
        started = time.perf_counter()
        if not isinstance(question, str) or not question.strip():
            raise RagPipelineError("the question is empty; give at least one word")
        check_top_k(top_k)
        check_policy(policy, ratio)
        return cls(
            question=question.strip(),
            top_k=top_k,
            sampling=sampling or SamplingOptions(),
            policy=policy,
            ratio=ratio,
            started=started,
        )

    def lay_out(
        self, builder: PromptBuilder, hits: list[SearchHit], *, context_length: int
    ) -> AnswerRun:
        """Turn the hits into a prompt; retrieval ends here."""
        retrieved = time.perf_counter()
        sampling = self.sampling.filled(
            repetition_penalty=builder.repetition_penalty, stop=builder.echo(self.question)
        )
        layout = builder.build(
            self.question,
            hits,
            max_new_tokens=sampling.max_new_tokens,
            context_length=context_length,
        )
        return AnswerRun(
            layout=layout,
            request=GenerationRequest(
                input_ids=layout.input_ids,
                fusion=fusion_request(layout.chunk_spans, self.policy, self.ratio),
                sampling=sampling,
            ),
            policy=self.policy,
            ratio=self.ratio,
            started=self.started,
            retrieved=retrieved,
        )


def check_top_k(top_k: int) -> None:
    """Refuse what is no number of chunks to retrieve."""
    if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1:
        raise RagPipelineError(f"top_k is {top_k!r}; it must be a whole number, at least 1")
