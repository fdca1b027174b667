"""A chat with a model: its messages are kept here, and each is answered from all of them or from a memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from rag_pipeline.errors import RagPipelineError
from rag_pipeline.generation import Backend
from rag_pipeline.models.decoding import repetition_penalty_of
from rag_pipeline.opened_memory import awaited, open_memory, utterances
from rag_pipeline.prompts.history import HistoryMessage
from rag_pipeline.prompts.segments import SegmentEncoder
from rag_pipeline.prompts.tokenizer import ModelTokenizer
from rag_pipeline.prompts.whole_chat import whole_chat
from rag_pipeline.protocol import (
    GenerationRequest,
    SamplingOptions,
    Usage,
    finish_reason,
    fusion_report,
    memory_report,
    usage_from_meta,
)
from rag_pipeline.types import NOTHING_CUT, Truncated

if TYPE_CHECKING:
    from rag_pipeline.memory import MemoryConfig, Prepared


@dataclass(frozen=True, kw_only=True, slots=True)
class FinishedTurn:
    """An answer and what it took.

    Parameters
    ----------
    text : str
        The answer, outer white space removed.
    usage : Usage
        Tokens.
    finish_reason : str or None
        As the engine says.
    memory : mapping
        What the engine reports on the memory; empty without one.
    truncated : Truncated
        Oldest turns that did not fit the context; of a chat without a memory.
    """

    text: str
    usage: Usage
    finish_reason: str | None
    memory: dict[str, Any]
    truncated: Truncated = NOTHING_CUT


class ChatSession:
    """One conversation with the model of a backend. For one thread.

    Parameters
    ----------
    backend : Backend
        Closed by :meth:`close`.
    model_folder : Path or str
        Folder of the backend's model.
    memory : MemoryConfig or None
        What a long conversation is answered from; None for all of it.
    system : str
        What the model is told first.
    sampling : SamplingOptions
        How to decode.
    messages : sequence of (str, str)
        Role (user or assistant) and text of what was said before.

    Examples
    --------
    >>> with ChatSession(EngineBackend.start(folder), folder) as chat:  # doctest: +SKIP
    ...     print("".join(chat.ask("Hello!")))
    """

    def __init__(
        self,
        backend: Backend,
        model_folder: Path | str,
        *,
        memory: MemoryConfig | None = None,
        system: str = "",
        sampling: SamplingOptions | None = None,
        messages: Sequence[tuple[str, str]] = (),
    ) -> None:
        self._backend = backend
        self._encoder = SegmentEncoder(ModelTokenizer.load(model_folder))
        self._memory = (
            None if memory is None else open_memory(memory, backend, self._encoder.tokenizer)
        )
        self._system = system.strip()
        sampling = sampling or SamplingOptions()
        if sampling.repetition_penalty is None:
            penalty = repetition_penalty_of(model_folder)
            sampling = dataclasses.replace(sampling, repetition_penalty=penalty)
        self._sampling = sampling
        self._messages = [HistoryMessage(role=role, text=text) for role, text in messages]
        self._last: FinishedTurn | None = None
        self.num_turns = 0

    @property
    def last(self) -> FinishedTurn:
        """The latest answer."""
        if self._last is None:
            raise RagPipelineError("the chat has no answer yet; ask something first")
        return self._last

    def ask(self, text: str) -> Generator[str, None, None]:
        """Answer a message piece by piece; it belongs to the conversation when the last piece has come.

        Raises
        ------
        RagPipelineError
            An empty message, one that does not fit, an engine that refuses.
        """
        text = text.strip()
        if not text:
            raise RagPipelineError("the message is empty; give at least one word")
        with self._memory.answering() if self._memory else nullcontext():
            request, prepared, cut = self._lay_out(text)
            said = ""
            meta: dict[str, Any] = {}
            pieces = self._backend.generate(request)
            try:
                for piece in pieces:
                    meta |= piece.meta_info
                    new = piece.text if said else piece.text.lstrip()
                    said += new
                    if new:
                        yield new
            finally:
                pieces.close()
        self._take(text, said.strip(), meta, prepared, cut, len(request.input_ids))

    def clear(self) -> None:
        """Begin a new conversation; the system's words stay."""
        self._messages.clear()

    def memory_facts(self) -> dict[str, Any]:
        """What the memory holds and has cost."""
        if self._memory is None:
            return {"method": "off"}
        config = self._memory.planner.config
        return {
            "method": config.method,
            "budget_tokens": config.budget_tokens,
            "episodes": config.episodes,
            **self._memory.stats().to_flat_json(),
        }

    def close(self) -> None:
        """End background work, and close the backend."""
        if self._memory is not None:
            self._memory.close()
        self._backend.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _lay_out(self, text: str) -> tuple[GenerationRequest, Prepared | None, Truncated]:
        if self._memory is None:
            ids, cut = whole_chat(
                self._encoder,
                self._system,
                self._messages,
                text,
                max_new_tokens=self._sampling.max_new_tokens,
                context_length=self._backend.context_length,
            )
            return GenerationRequest(input_ids=ids, sampling=self._sampling), None, cut
        plan = self._memory.planner.plan(
            self._system,
            utterances([self._messages]),
            text,
            max_new_tokens=self._sampling.max_new_tokens,
        )
        self._memory.build_now(awaited(self._memory, plan))
        prepared = self._memory.prepare_planned(plan, self._sampling)
        return prepared.request, prepared, NOTHING_CUT

    def _take(
        self,
        question: str,
        answer: str,
        meta: dict[str, Any],
        prepared: Prepared | None,
        cut: Truncated,
        prompt_tokens: int,
    ) -> None:
        self._messages += [
            HistoryMessage(role="user", text=question),
            HistoryMessage(role="assistant", text=answer),
        ]
        self.num_turns += 1
        self._last = FinishedTurn(
            text=answer,
            usage=usage_from_meta(meta, prompt_tokens=prompt_tokens),
            finish_reason=finish_reason(meta)[0],
            memory=dict(memory_report(fusion_report(meta))),
            truncated=cut,
        )
        if self._memory is not None and prepared is not None:
            self._memory.note(prepared, meta)
            self._memory.after(self._system, utterances([self._messages]))
