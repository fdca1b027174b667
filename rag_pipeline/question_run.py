"""One question on its way through the pipeline: checked, laid out, answered, timed."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from rag_pipeline.errors import RagPipelineError
from rag_pipeline.generation import extra_fields, usage_from_meta
from rag_pipeline.generation.base import finish_reason
from rag_pipeline.prompt_layout import PromptBuilder
from rag_pipeline.types import (
    Answer,
    GenerationPiece,
    GenerationRequest,
    PromptLayout,
    SamplingOptions,
    Source,
    Timing,
)
from retrievers.types import SearchHit


@dataclass(kw_only=True, slots=True)
class QuestionRun:
    """One question on its way; sync and async callers differ only in how they wait.

    Made by :meth:`start`, then :meth:`lay_out`, :meth:`take` for every piece, :meth:`answer`.
    Times are seconds of ``time.perf_counter``.
    """

    question: str
    top_k: int
    sampling: SamplingOptions
    policy: str
    ratio: float | None
    started: float
    retrieved: float = 0.0
    first: float | None = None
    layout: PromptLayout | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    text: str = ""

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
        sampling = sampling or SamplingOptions()
        extra_fields(GenerationRequest(input_ids=(), sampling=sampling, policy=policy, ratio=ratio))
        return cls(
            question=question.strip(),
            top_k=top_k,
            sampling=sampling,
            policy=policy,
            ratio=ratio,
            started=started,
        )

    def lay_out(
        self, builder: PromptBuilder, hits: list[SearchHit], *, context_length: int
    ) -> GenerationRequest:
        """Turn the hits into a request; retrieval ends here."""
        self.retrieved = time.perf_counter()
        self.sampling = self.sampling.filled(
            repetition_penalty=builder.repetition_penalty, stop=builder.echo(self.question)
        )
        self.layout = builder.build(
            self.question,
            hits,
            max_new_tokens=self.sampling.max_new_tokens,
            context_length=context_length,
        )
        return GenerationRequest(
            input_ids=self.layout.input_ids,
            spans=self.layout.chunk_spans,
            sampling=self.sampling,
            policy=self.policy,
            ratio=self.ratio,
        )

    def take(self, piece: GenerationPiece) -> str:
        """Note one piece and return the text to hand on; leading white space is dropped."""
        if self.first is None:
            self.first = time.perf_counter()
        # An incremental stream reports the fusion in its first message only, and empty afterwards.
        self.meta.update({key: value for key, value in piece.meta_info.items() if value != []})
        text = piece.text if self.text else piece.text.lstrip()
        self.text += text
        return text

    def answer(self) -> Answer:
        """Sum up when the last piece has come."""
        assert self.layout is not None
        now = time.perf_counter()
        meta = self.meta
        return Answer(
            answer=self.text.strip(),
            sources=tuple(Source.from_hit(hit) for hit in self.layout.chunks),
            usage=usage_from_meta(meta, prompt_tokens=len(self.layout.input_ids)),
            timing=Timing(
                retrieve_s=self.retrieved - self.started,
                ttft_s=(self.first or now) - self.retrieved,
                total_s=now - self.started,
            ),
            policy=self.policy,
            ratio=self.ratio,
            dropped_sources=tuple(Source.from_hit(hit) for hit in self.layout.dropped),
            finish_reason=finish_reason(meta)[0],
        )


def check_top_k(top_k: int) -> None:
    """Refuse what is no number of chunks to retrieve."""
    if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1:
        raise RagPipelineError(f"top_k is {top_k!r}; it must be a whole number, at least 1")
