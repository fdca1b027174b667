"""One question on its way through the pipeline: checked, retrieved for, laid out, answered, timed."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Unpack

from rag_pipeline.errors import RagPipelineError
from rag_pipeline.memory import MemoryConfig, parse_memory
from rag_pipeline.opened_memory import (
    Asked,
    RememberedTurn,
    plan_turn,
    prepare_turn,
    utterances,
)
from rag_pipeline.prompts.builder import PromptBuilder
from rag_pipeline.prompts.chunk_message import lay_out_message, write_message
from rag_pipeline.prompts.history import HistoryMessage, Turn, turns_of
from rag_pipeline.prompts.truncation import Truncation, check_truncation
from rag_pipeline.protocol import (
    FusionChoice,
    FusionFields,
    GenerationPiece,
    GenerationRequest,
    SamplingOptions,
    Usage,
    finish_reason,
    usage_from_meta,
)
from rag_pipeline.types import Answer, PromptLayout, Source, Timing
from retrievers.types import SearchHit

if TYPE_CHECKING:
    from rag_pipeline.memory import Memory


class QuestionOptions(FusionFields, total=False):
    """How one question is asked; a key that is left out takes the pipeline's default.

    Attributes
    ----------
    top_k : int or None
        Chunks to retrieve, at least 1; the pipeline's own number when None.
    sampling : SamplingOptions or None
        How to decode; greedy, 128 tokens when None.
    where : mapping or None
        Filter on chunk metadata, handed to the retriever.
    history : sequence or None
        Earlier messages of the conversation, the oldest first: mappings of OpenAI's ``role`` (user or assistant) and
        ``content``. Only the question is retrieved by.
    truncation : str
        ``auto`` cuts the oldest turns of a history that does not fit the context, ``disabled`` refuses it.
    policy, ratio, attention : str, float or None, str
        See :class:`~rag_pipeline.protocol.FusionChoice`.
    memory : MemoryConfig, mapping, str or None
        What a long history is answered from: a method such as ``epicache``, a mapping such as ``{"budget_tokens": 2048}``,
        ``off`` for all of it; the pipeline's own when None. Chunks are then computed with the question.
    """

    top_k: int | None
    sampling: SamplingOptions | None
    where: Mapping[str, object] | None
    history: Sequence[HistoryMessage | Mapping[str, object]] | None
    truncation: Truncation
    memory: MemoryConfig | Mapping[str, Any] | str | None


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
    fusion : FusionChoice
        As asked.
    started, retrieved : float
        When the question came, and when its chunks were found.
    remembered : RememberedTurn or None
        The memory that its history is answered from.
    """

    layout: PromptLayout
    request: GenerationRequest
    fusion: FusionChoice
    started: float
    retrieved: float
    remembered: RememberedTurn | None = None
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
        """Sum up when the last piece has come; a memory is built further behind it."""
        if self.remembered is not None:
            self.remembered.memory.note(self.remembered.prepared, self.meta)
            self.remembered.ended(self.text.strip() or None)
        return Answer(
            answer=self.text.strip(),
            sources=tuple(Source.from_hit(hit) for hit in self.layout.chunks),
            usage=self.usage,
            timing=self.timing(),
            policy=self.fusion.policy,
            ratio=self.fusion.ratio,
            dropped_sources=tuple(Source.from_hit(hit) for hit in self.layout.dropped),
            finish_reason=self.finish,
            truncated=self.layout.truncated,
            memory=self.remembered.facts(self.meta) if self.remembered else None,
        )


@dataclass(kw_only=True, slots=True)
class QuestionRun:
    """A checked question; made by :meth:`start`, and by :meth:`lay_out` turned into a prompt."""

    question: str
    top_k: int
    sampling: SamplingOptions
    where: Mapping[str, object] | None
    fusion: FusionChoice
    started: float
    history: tuple[Turn, ...] = ()
    truncation: Truncation = "auto"
    memory: MemoryConfig | None = None

    @classmethod
    def start(
        cls,
        question: str,
        default_top_k: int,
        *,
        top_k: int | None = None,
        sampling: SamplingOptions | None = None,
        where: Mapping[str, object] | None = None,
        history: Sequence[HistoryMessage | Mapping[str, object]] | None = None,
        truncation: Truncation = "auto",
        memory: MemoryConfig | Mapping[str, Any] | str | None = None,
        **fusion: Unpack[FusionFields],
    ) -> QuestionRun:
        """Check everything that can be checked before any work."""
        started = time.perf_counter()
        if not isinstance(question, str) or not question.strip():
            raise RagPipelineError("the question is empty; give at least one word")
        top_k = default_top_k if top_k is None else top_k
        check_top_k(top_k)
        check_truncation(truncation)
        turns = turns_of(HistoryMessage.read(message) for message in history or ())
        choice = FusionChoice(**fusion)
        choice.check()
        return cls(
            question=question.strip(),
            top_k=top_k,
            sampling=sampling or SamplingOptions(),
            where=where,
            fusion=choice,
            started=started,
            history=turns,
            truncation=truncation,
            memory=None if memory is None else parse_memory(memory),
        )

    def remember(
        self, builder: PromptBuilder, memory: Memory, hits: list[SearchHit], *, context_length: int
    ) -> AnswerRun | None:
        """Turn the hits into a prompt whose history is a memory; None for a history that is short enough as it is."""
        retrieved = time.perf_counter()
        sampling = self._sampling(builder)
        message = write_message(
            builder,
            self.question,
            hits,
            max_new_tokens=sampling.max_new_tokens,
            context_length=context_length,
            told_tokens=memory.planner.config.most_told_tokens,
        )
        asked = Asked(
            system=builder.system_prompt,
            history=utterances(self.history),
            question=message.text,
            asked=self.question,
        )
        planned = plan_turn(memory, asked, sampling)
        if planned is None:
            return None
        for build in planned.build():
            build.result()
        turn = prepare_turn(planned, sampling)
        layout = lay_out_message(builder, message, turn.input_ids)
        return AnswerRun(
            layout=layout,
            request=turn.prepared.request,
            fusion=FusionChoice(),
            started=self.started,
            retrieved=retrieved,
            remembered=turn,
        )

    def _sampling(self, builder: PromptBuilder) -> SamplingOptions:
        return self.sampling.filled(
            repetition_penalty=builder.repetition_penalty, stop=builder.echo(self.question)
        )

    def lay_out(
        self, builder: PromptBuilder, hits: list[SearchHit], *, context_length: int
    ) -> AnswerRun:
        """Turn the hits into a prompt; retrieval ends here."""
        retrieved = time.perf_counter()
        sampling = self._sampling(builder)
        layout = builder.build(
            self.question,
            hits,
            max_new_tokens=sampling.max_new_tokens,
            context_length=context_length,
            history=self.history,
            truncation=self.truncation,
        )
        return AnswerRun(
            layout=layout,
            request=GenerationRequest(
                input_ids=layout.input_ids,
                fusion=self.fusion.request(layout.chunk_spans),
                sampling=sampling,
            ),
            fusion=self.fusion,
            started=self.started,
            retrieved=retrieved,
        )


def check_top_k(top_k: int) -> None:
    """Refuse what is no number of chunks to retrieve."""
    if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1:
        raise RagPipelineError(f"top_k is {top_k!r}; it must be a whole number, at least 1")
