"""A conversation's memory from end to end: plan, wait or not, answer, build ahead."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from rag_pipeline.generation import Backend
from rag_pipeline.memory.builder import BuildStats
from rag_pipeline.memory.plan import Candidate, MemoryPlan, Utterance
from rag_pipeline.memory.planner import Planner
from rag_pipeline.protocol import GenerationRequest, SamplingOptions


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """The prompt that an answer is made from.

    Parameters
    ----------
    request : GenerationRequest
        For the backend.
    candidate : Candidate
        Its layout.
    plan : MemoryPlan
        Whole plan.
    """

    request: GenerationRequest
    candidate: Candidate
    plan: MemoryPlan


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryStats:
    """Counts since the memory was made.

    Attributes
    ----------
    answers : int
        Prompts that were prepared.
    loaded, missed, verbatim, window : int
        How they came out: from a record, with a record that was gone, with the whole history as it is, and with a
        sliding window because nothing was built yet.
    build : BuildStats
        What the records have cost.
    """

    answers: int
    loaded: int
    missed: int
    verbatim: int
    window: int
    build: BuildStats

    def to_json(self) -> dict[str, Any]:
        """One object, `build` nested."""
        raise NotImplementedError


class Memory:
    """Answers questions of long conversations from records of a fixed size.

    Use it in this order, per turn::

        with memory.answering():
            prepared = memory.prepare(system, history, question)
            ... backend.generate(prepared.request) ...
            memory.note(prepared, meta_info)
        memory.after(system, history + [Utterance("user", question), Utterance("assistant", answer)])

    Parameters
    ----------
    planner : Planner
        Lays out prompts.
    backend : Backend
        Runs the builds; not closed here.
    existing : callable, optional
        See :class:`~rag_pipeline.memory.builder.MemoryBuilder`.
    """

    def __init__(
        self,
        planner: Planner,
        backend: Backend,
        *,
        existing: Callable[[Sequence[str]], Collection[str]] | None = None,
    ) -> None:
        raise NotImplementedError

    def prepare(
        self,
        system: str,
        history: Sequence[Utterance],
        question: str,
        *,
        sampling: SamplingOptions | None = None,
        wait: bool = False,
    ) -> Prepared:
        """Lay out the prompt of an answer.

        Parameters
        ----------
        system, history, question : str, sequence of Utterance, str
            As for :meth:`Planner.plan`.
        sampling : SamplingOptions, optional
            How it is decoded; its `max_new_tokens` are left room for.
        wait : bool
            Build the newest record first instead of answering from what is there.

        Raises
        ------
        RagPipelineError
            As :meth:`Planner.plan` does. A build that fails is none: the prompt is then a sliding window.
        """
        raise NotImplementedError

    async def aprepare(
        self,
        system: str,
        history: Sequence[Utterance],
        question: str,
        *,
        sampling: SamplingOptions | None = None,
        wait: bool = False,
    ) -> Prepared:
        """As :meth:`prepare`, without blocking the event loop."""
        raise NotImplementedError

    def note(self, prepared: Prepared, meta_info: Mapping[str, Any]) -> None:
        """Take in what the engine reported on the answer; a record that was gone is built again."""
        raise NotImplementedError

    def after(self, system: str, history: Sequence[Utterance]) -> None:
        """Build ahead in the background; returns at once, and raises nothing for a history that cannot be planned."""
        raise NotImplementedError

    def answering(self) -> Any:
        """Context manager around an answer: builds that nobody waits for stand still."""
        raise NotImplementedError

    def stats(self) -> MemoryStats:
        """Counts so far."""
        raise NotImplementedError

    def close(self) -> None:
        """End the builds; the backend runs on."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
